"""What pruning could leave behind on a model."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig

OF_TRANSFORMERS = ("_cache", "_previous_max_cache_length")
"""Beginnings of attributes that transformers sets in a call, unpruned as well."""


def footprint(model: nn.Module) -> dict[str, Any]:
    """Return of every module its hooks of each kind, its own attributes and how it attends.

    Lightning's are the mode and, of a LightningModule, the attributes, but for methods that pruning replaces.
    """
    return {
        name: (hooks_of(part), _attributes(part), _attention(getattr(part, "config", None)))
        for name, part in model.named_modules()
    }


def everything_of(model: nn.Module) -> list[Any]:
    """Return its footprint, the mode of every module, and every attribute."""
    return [footprint(model), modes(model), [sorted(vars(part)) for part in model.modules()]]


def modes(model: nn.Module) -> list[bool]:
    """Return of every module if it is in training mode."""
    return [part.training for part in model.modules()]


def hooks_of(part: nn.Module) -> dict[str, int]:
    """Return how many hooks of each kind a module has."""
    return {kind: len(value) for kind, value in vars(part).items() if "hooks" in kind and isinstance(value, dict)}


def _attributes(part: nn.Module) -> list[str]:
    if hasattr(part, "configure_optimizers"):  # a LightningModule of either package
        return sorted(set(vars(part)) & {"forward", "generate"})
    return sorted(name for name in vars(part) if not name.startswith(OF_TRANSFORMERS))


def _attention(config: Any) -> list[Any]:
    if not isinstance(config, PretrainedConfig):
        return []
    below = [_attention(getattr(config, name)) for name in config.sub_configs]
    return [config._attn_implementation, config._attn_implementation_internal, *below]
