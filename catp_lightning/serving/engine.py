"""What vLLM can carry of a policy, and what its models are asked for: free of vLLM, so that it is tested without."""

from typing import Any

import torch
from torch import Tensor

from catp_lightning.errors import PolicyError
from catp_lightning.methods import SCORERS, Observation, Signal
from catp_lightning.methods.observation import Values
from catp_lightning.methods.scorers import Position, Stride
from catp_lightning.policy import PruningPolicy
from catp_lightning.serving.contract import check_servable, kept_tokens

POSITIONS = {"llava": "compact", "qwen2_5_vl": "original", "qwen3_vl": "original"}
"""Model types that the plug-in knows, and which positions kept tokens get there: vLLM numbers LLaVA's anew."""

SHOWN = frozenset({Signal.IMAGE_FEATURES, Signal.PATCH_POSITION})
"""Signals that vLLM's models show: their towers run fused attention, which leaves no weights."""


def policy_of(config: Any) -> PruningPolicy:
    """Return the policy that a model's config names as `catp_policy`: a path, or an address that `load` takes.

    Raises:
        PolicyError: none is named, it cannot be loaded, or vLLM cannot carry it on this model.
    """
    path = getattr(config, "catp_policy", None)
    if not isinstance(path, str):
        raise PolicyError(
            f"The config has catp_policy={path!r:.200}; it is the path of a policy's file. Start vLLM with "
            '--hf-overrides \'{"architectures": ["Catp..."], "catp_policy": "/path/policy.json"}\'; '
            "docs/serving.md has the names."
        )
    policy = PruningPolicy.load(path)
    check_engine(policy, config)
    return policy


def check_engine(policy: PruningPolicy, config: Any) -> None:
    """Raise PolicyError if vLLM cannot carry a policy on a model.

    Args:
        policy: the policy.
        config: the model's, of transformers.
    """
    method, kind = check_servable(policy), config.model_type
    made_for = None if policy.model is None else policy.model.get("type")
    if made_for is not None and made_for != kind:
        raise _refused(policy, f"it was made for {made_for}; this model is {kind}")
    if kind not in POSITIONS:
        raise _refused(policy, f"the plug-in knows {', '.join(POSITIONS)}; this model is {kind}")
    if kind == "llava":
        vision, rows = config.vision_config.model_type, config.vision_feature_select_strategy
        if (vision, rows) != ("clip_vision_model", "default"):
            raise _refused(
                policy, f"of LLaVA's towers the plug-in knows CLIP's patches alone; here they are {vision}, {rows!r}"
            )
    if policy.positions != POSITIONS[kind] and not policy.everything:
        raise _refused(
            policy,
            f'its positions are "{policy.positions}", and vLLM gives kept tokens of {kind} "{POSITIONS[kind]}" ones: '
            "measure it with these",
        )
    if Signal.IMAGE_HASH in method.needs and not isinstance(method.scorer, Position | Stride):
        raise _refused(policy, f"{SCORERS.name_of(method.scorer)!r} reads a checksum of pixels, which vLLM changes")
    hidden = sorted(s.name.lower().replace("_", "-") for s in method.needs.keys() - SHOWN - {Signal.IMAGE_HASH})
    if hidden:
        raise _refused(policy, f"it reads {', '.join(hidden)}, which vLLM's fused kernels do not show")


def kept_of_image(policy: PruningPolicy, features: Tensor, rows: int, columns: int) -> Tensor:
    """Return the places of an image's tokens that stay, in order: int64 [K, 2], row and column.

    Args:
        policy: one that `check_engine` let pass.
        features: float [rows * columns, D], the image's tokens line by line.
        rows, columns: its grid, in tokens.
    """
    grid = torch.cartesian_prod(*(torch.arange(size, device=features.device) for size in (rows, columns)))
    values: Values = {
        Signal.IMAGE_FEATURES: features[None],
        Signal.PATCH_POSITION: torch.nn.functional.pad(grid, (1, 0))[None],
        Signal.IMAGE_HASH: grid.new_zeros(1),  # its value is not read
    }
    return grid[kept_tokens(policy, Observation.of_equal(1, len(features), {}, values))[0]]


def _refused(policy: PruningPolicy, why: str) -> PolicyError:
    return PolicyError(f"vLLM cannot carry {policy!r:.200}: {why}.")
