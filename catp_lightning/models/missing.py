"""Errors for a module in which nothing can be pruned: what was looked for, what was found, and what that lacks."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from catp_lightning.errors import PruningError
from catp_lightning.models.refused import REFUSED
from catp_lightning.utils.parts import outermost, parts_of

SHOWN = 5
TORCHS_OWN = vars(nn.Module()).keys()


def lacks(model: PreTrainedModel) -> str | None:
    """Return why a Hugging Face model is not one whose decoder reads visual tokens in a prompt; None if it is one."""
    return next(_reasons(model), None)


def _reasons(model: PreTrainedModel) -> Iterator[str]:
    config: Any = model.config
    outer: Any = getattr(model, "model", None)
    if (refused := REFUSED.get(config.model_type)) is not None:
        yield refused
    if getattr(config, "is_encoder_decoder", False):
        yield "is an encoder-decoder: its prompt has no placeholders that visual tokens take the place of"
    named = hasattr(config, "image_token_id")
    if not model.can_generate():
        yield "has no language-model head; hand over the model that has it" if named else "generates no text"
    if not named:
        sees = getattr(config, "vision_config", None) is not None
        yield (
            "has no image_token_id in its config, so its visual tokens cannot be told from text"
            if sees
            else ("reads text alone: its config has neither image_token_id nor vision_config")
        )
    if not isinstance(outer, PreTrainedModel):
        yield "has no part `model` below its head that puts visual tokens into the prompt"
    decoder = outer.get_decoder()
    if decoder is outer or not hasattr(decoder, "layers"):
        yield "has no text decoder with `layers` of its own, whose rows could leave"


def refuse_other(module: Any) -> None:
    """Raise PruningError if `module` is not a torch module, but a list of models, a pipeline or a name, for example."""
    if isinstance(module, nn.Module):
        return
    inside = [f"a {type(part).__name__} at {place}" for place, part in _models(module, "it", 2)]
    held = f" It holds {_listed(inside)}: hand over that." if inside else ""
    raise PruningError(
        f"{type(module).__name__} is not a torch.nn.Module, so there is nothing to prune in it.{held or _hint(module)}"
    )


def _hint(module: Any) -> str:
    name = " A name is not loaded here: call from_pretrained first." if isinstance(module, str) else ""
    return f"{name} Hand over the Hugging Face model, or a module that holds it."


def no_model(module: nn.Module, classes: Iterable[str]) -> PruningError:
    """Return the error for a module that holds no supported model.

    Args:
        module: the module that was searched.
        classes: names of the Hugging Face classes that are supported.
    """
    for path, part in outermost(module, _model):
        if (refused := REFUSED.get(str(part.config.model_type))) is not None:
            return PruningError(f"{_at(path, part)} cannot be pruned: it {refused}.")
    found = [f"{_at(path, part)} {lacks(part) or 'is not supported'}" for path, part in outermost(module, _model)]
    hidden = [f"a {type(part).__name__} in {place}" for place, part in _out_of_sight(module)]
    reasons = [f"Found: {_listed(found)}."] if found else []
    if hidden:
        reasons.append(
            f"Not searched: {_listed(hidden)}. torch sees no module there, so it cannot be moved, trained or found: "
            "assign the model itself to an attribute, or use nn.ModuleList or nn.ModuleDict."
        )
    if not reasons:
        reasons.append(
            "Found: no Hugging Face model at all. A model that is made in configure_model or setup must be there first."
        )
    return PruningError(
        f"{type(module).__name__} holds no model that can be pruned. {' '.join(reasons)} Looked for: "
        f"{', '.join(classes)}, and others that generate text, have image_token_id in their config and a decoder with "
        "layers."
    )


def _at(path: str, part: PreTrainedModel) -> str:
    return f"{type(part).__name__} ({path})" if path else type(part).__name__


def _listed(found: list[str]) -> str:
    more = len(found) - SHOWN
    return "; ".join(found[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _model(part: nn.Module) -> PreTrainedModel | None:
    return part if isinstance(part, PreTrainedModel) else None


def _out_of_sight(module: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield place and model of Hugging Face models that a module holds where torch does not look.

    Those places are lists, dictionaries and other objects.
    """
    there = parts_of(module)
    for part, path in there.items():
        for name, value in vars(part).items():
            if name not in TORCHS_OWN:
                found = _models(value, f"{path}.{name}".lstrip("."), 2)
                yield from ((place, model) for place, model in found if model not in there)


def _models(value: Any, place: str, depth: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield place and model of the Hugging Face models in a value.

    Args:
        value: a module, a container, or an object whose attributes are searched.
        place: where the value is, for an error message.
        depth: levels of containers and objects that are searched.
    """
    if isinstance(value, nn.Module):
        yield from ((f"{place}.{path}".rstrip("."), model) for path, model in outermost(value, _model))
        return
    if depth == 0:
        return
    inside: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        inside = [(f"{place}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        inside = [(f"{place}.{name}", item) for name, item in vars(value).items()]
    for at, item in inside:
        yield from _models(item, at, depth - 1)
