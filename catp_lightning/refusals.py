"""What is refused before anything is pruned: a policy for another model, a rule that makes no sense here."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.families import Family
from catp_lightning.observation import STAGED, Needs, Signal
from catp_lightning.policy import PruningPolicy
from catp_lightning.selectors import Selector

MARK = "_catp_pruning"
"""On a model while it is being pruned."""


def check_model(policy: PruningPolicy, family: Family) -> None:
    """Raise PolicyError where a policy was made for another architecture; warn where it was for another checkpoint."""
    if policy.model is None:
        return
    made_for, here = dict(policy.model), family.describe()
    names = made_for.pop("name", ""), here.pop("name", "")
    if made_for != here:
        raise PolicyError(
            f"The policy was made for {_described(made_for)}; this model is {_described(here)}. "
            "Calibrate again with CrossAttentionCalibration, or load the model it was made for."
        )
    if all(names) and names[0] != names[1]:
        warnings.warn(
            f"The policy was made for the checkpoint {names[0]!r} and is used on {names[1]!r} of the same shape: "
            "what it promises was measured on the first.",
            stacklevel=4,
        )


def _described(model: Mapping[str, Any]) -> str:
    shape = [f"{value} {key.replace('_', ' ')}" for key, value in model.items() if key != "type"]
    return f"{model.get('type', 'a model')} with {', '.join(shape)}" if shape else str(model.get("type", "unknown"))


def refuse_unprunable(module: nn.Module, family: Family) -> None:
    """Raise PruningError where a model is being pruned already, or was compiled before."""
    if MARK in family.model.__dict__:
        raise PruningError("This model is being pruned already: leave that context first, prune does not nest.")
    parts = (*module.modules(), *family.model.modules())
    if any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts):
        raise PruningError(
            "The model was compiled before pruning and would ignore it. Enter prune first and compile inside, "
            "or prune the module that was compiled."
        )


def refuse_at_stages(policy: PruningPolicy, selector: Selector, wanted: Needs) -> None:
    """Raise PolicyError where tokens leave inside the decoder and what is needed is seen before it."""
    per = policy.selector_args.get("per", "sample")
    if per != "sample" or not (wanted.keys() - {Signal.FINGERPRINT}) <= STAGED:
        raise PolicyError(
            f"scorer {policy.scorer!r} drops tokens inside the decoder, where a budget is of the whole sample and "
            f"only the decoder's own rows are seen: leave selector and selector_args out (selector is "
            f"{policy.selector!r}, selector_args {dict(policy.selector_args)})."
        )


def refuse_merging(policy: PruningPolicy, selector: Selector, family: Family) -> None:
    """Raise PruningError where no decoder reads visual tokens as rows, or they have no grid to be averaged on."""
    if selector.needs_grid and not family.has_grid:
        raise PruningError(
            f"The policy's {policy.selector or policy.scorer!r} averages tokens over a square grid, and those of "
            f"{type(family.model).__name__} are none: they are queries, or of several crops, or have line ends or a "
            "[CLS] among them. Use it on a LLaVA-1.5, or choose another control: stride works on every model."
        )
    if family.reads != "decoder":
        raise PruningError(
            f"The policy's {policy.selector or policy.scorer!r} merges tokens, which is exact where a decoder reads "
            f"them as rows; {type(family.model).__name__} reads them by {family.reads}. Choose another selector; "
            "docs/methods.md lists them."
        )
