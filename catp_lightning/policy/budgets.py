"""Budgets as policies hold them: numbers of tokens, and prices, with their form in JSON."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from catp_lightning.errors import PolicyError, did_you_mean

if TYPE_CHECKING:
    Budget = int | float
else:
    # For signatures that the command line reads. It tries the types of a union in order, and typing's cache makes that
    # the order in which the union was first written anywhere: YAML's 1, one token, could become 1.0, all tokens.
    Budget = Any

UNITS = ("tokens", "tokens_per_layer", "prefill_flops", "cache_bytes", "prefill_time")
"""What a price is paid in: visual tokens left after the last stage, those a layer of the language model reads (the mean
over its layers), FLOPs of its prefill, bytes of its cache after it, and seconds of it."""


def check_keep(keep: Any) -> None:
    """Raise PolicyError unless `keep` is a float in (0, 1] or an int >= 1."""
    allowed = "keep is a share, a float in (0, 1], or a number of tokens, an int of at least 1"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise PolicyError(f"keep is {keep!r:.200}; {allowed}.")
    if isinstance(keep, int) and keep.bit_length() > 63:
        raise PolicyError(f"keep is a number of {keep.bit_length()} bits; {allowed}, and no model has 2**63 of them.")
    if isinstance(keep, int) and keep < 1:
        raise PolicyError(f"keep is {keep}; {allowed}.")
    if isinstance(keep, float) and not (math.isfinite(keep) and 0 < keep <= 1):
        hint = (
            f" For {keep:g} tokens write keep={keep:.0f}, without the point." if keep > 1 and keep.is_integer() else ""
        )
        raise PolicyError(f"keep is {keep}; {allowed}.{hint}")


def keep_to_json(keep: int | float) -> dict[str, int | float]:
    """Return {"share": 1.0} or {"tokens": 1}, because JSON does not tell a float from an int."""
    return {"tokens": keep} if isinstance(keep, int) else {"share": float(keep)}


def keep_from_json(value: Any) -> Any:
    """Return the share or number of tokens that `keep_to_json` wrote.

    Raises:
        PolicyError: the value is something else.
    """
    if isinstance(value, Mapping) and len(value) == 1:
        (kind, number), *_ = value.items()
        if kind == "share" and isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 2**63:
            return float(number)
        if kind == "tokens" and isinstance(number, int) and not isinstance(number, bool):
            return number
    raise PolicyError(f'keep is {value!r:.200}; in a file it is {{"share": 0.5}} or {{"tokens": 16}}.')


def check_price(budget: Any) -> tuple[str, float]:
    """Return unit and share of a price, {"prefill_flops": 0.25}.

    Raises:
        PolicyError: it does not name one unit of `UNITS`, or the share is no number in (0, 1].
    """
    allowed = 'a budget is a share of what the unpruned model pays, {"prefill_flops": 0.25}, in one of '
    allowed += ", ".join(UNITS)
    if not isinstance(budget, Mapping) or len(budget) != 1:
        raise PolicyError(f"budget is {budget!r:.200}; {allowed}.")
    ((unit, share),) = budget.items()
    if unit not in UNITS:
        raise PolicyError(f"budget is in {unit!r:.200}; {allowed}.{did_you_mean(unit, UNITS)}")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise PolicyError(f"budget is {share!r:.200} of {unit}; {allowed}, above 0 and at most 1.")
    return unit, float(share)
