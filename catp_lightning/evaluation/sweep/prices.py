"""Prices at which a sweep compares methods: what a policy pays, and the budget of tokens with which it pays a price."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from catp_lightning.errors import PolicyError
from catp_lightning.methods.schedule import places
from catp_lightning.models import Family
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.budgets import check_price
from catp_lightning.policy.stages import Stage
from catp_lightning.pricing import COUNTED, Prices, Prompts, Unit, largest, tokens_read
from catp_lightning.pruning.record import Prefill

UNIT_NAMES: dict[str, str] = {
    "tokens": "visual tokens kept",
    "tokens_per_layer": "visual tokens a layer reads",
    "prefill_flops": "prefill FLOPs",
    "cache_bytes": "cache bytes",
}


@dataclass(frozen=True)
class Price:
    """Price at which methods are compared.

    Attributes:
        unit: what is paid.
        share: share of what the unpruned model pays, in (0, 1].
    """

    unit: Unit
    share: float

    @property
    def budget(self) -> dict[str, float]:
        """The price as `PruningPolicy.budget` holds it."""
        return {self.unit: self.share}

    def __str__(self) -> str:
        return f"{self.share:g} of {self.unit}"


def known_prices(family: Family) -> Prices | None:
    """Return the prices of a model's prompts; None if it reads the image by cross-attention: they are not counted."""
    return None if family.reads == "cross-attention" else Prices.of(family)


def prices_asked(budget: Mapping[str, Any]) -> list[Price]:
    """Return the prices of {"prefill_flops": [0.5, 0.25]}: units, and a share or several of each.

    Raises:
        PolicyError: a unit or a share is not allowed, a price is named twice, or none is.
    """
    found = []
    for unit, shares in budget.items():
        for share in shares if isinstance(shares, Sequence) and not isinstance(shares, str) else [shares]:
            _, number = check_price({unit: share})
            if unit not in COUNTED:
                raise PolicyError(
                    f"budget is in {unit}, which is measured on a device; a sweep compares at prices that are counted, "
                    f"in {', '.join(COUNTED)}."
                )
            found.append(Price(unit, number))
    if not found or len(set(found)) < len(found):
        raise PolicyError(
            f"budget is {dict(budget)!r:.200}; give a unit with one share or several different ones: "
            '{"prefill_flops": [0.5, 0.25]}.'
        )
    return found


@dataclass(frozen=True)
class Sizes:
    """Sizes of the prompts that a run read, and the visual tokens that layers read of them.

    Attributes:
        counts: number of prompts by (rows of text, visual tokens, visual tokens that each layer reads).
    """

    counts: Mapping[tuple[int, int, tuple[int, ...]], int]

    @classmethod
    def of(cls, prefills: Iterable[Prefill]) -> "Sizes":
        """Count the prompts of some prefills.

        Raises:
            PolicyError: rows of text are not known for this model.
        """
        found: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
        for prefill in prefills:
            if prefill.text is None:
                raise PolicyError(
                    "The model reads the image by cross-attention, and a sweep knows prices only where visual tokens "
                    "are rows of the prompt: compare at numbers of tokens, --keep."
                )
            rows = (part.tolist() for part in (prefill.text, prefill.counts, prefill.per_layer))
            found.update((text, tokens, tuple(layers)) for text, tokens, layers in zip(*rows, strict=True))
        return cls(found)

    def paid(self, prices: Prices) -> dict[str, float]:
        """Return what was paid, as a share of what the unpruned model pays, in each unit that is known."""
        text, tokens, layers = zip(*self.counts, strict=True)
        prompts, times = _prompts(text, tokens, list(self.counts.values()))
        read = torch.tensor(layers, dtype=torch.int64, device="cpu")
        known = [unit for unit in COUNTED if unit not in prices.unknown]
        return {unit: prices.share(unit, prompts, read, times) for unit in known}

    def to_json(self) -> list[list[int]]:
        """Return [rows of text, visual tokens, number of prompts], for each pair of the first two."""
        found: Counter[tuple[int, int]] = Counter()
        for (text, tokens, _), number in self.counts.items():
            found[text, tokens] += number
        return [[*size, number] for size, number in sorted(found.items())]


def _prompts(text: Sequence[int], tokens: Sequence[int], numbers: Sequence[int]) -> tuple[Prompts, Tensor]:
    """Return prompts, and the numbers of them: float64 [N], because FLOPs of very many exceed int64."""
    sizes = (torch.tensor(values, dtype=torch.int64, device="cpu") for values in (text, tokens))
    return Prompts.of(*sizes), torch.tensor(numbers, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Solver:
    """Finds the budget of tokens with which a policy pays a price, over the prompts that methods are compared on.

    Attributes:
        prices: prices of prompts for the model.
        sizes: [rows of text, visual tokens, number of prompts], as `Sizes.to_json` gives them.
    """

    prices: Prices
    sizes: Sequence[Sequence[int]]
    _found: dict[Any, float | None] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> float:
        """Mean number of visual tokens of a prompt."""
        total = sum(tokens * number for _, tokens, number in self.sizes)
        return float(total / max(1, sum(number for *_, number in self.sizes)))

    def share(self, unit: Unit, policy: PruningPolicy) -> float:
        """Return what a policy pays, as a share of what the unpruned model pays, by arithmetic.

        Raises:
            PolicyError: the number of tokens it keeps depends on the prompt.
            PruningError: the unit is not known for this model.
        """
        prompts, times = _prompts(*zip(*self.sizes, strict=True))
        read = tokens_read(policy.steps(), prompts.tokens, self.prices.depth)
        return self.prices.share(unit, prompts, read, times)

    def solve(
        self, policy: PruningPolicy, price: Price, schedule: Callable[[float], PruningPolicy] | None = None
    ) -> PruningPolicy | None:
        """Return a policy with the largest budget that does not exceed a price; None: it exceeds it with one token.

        Of a policy whose tokens all leave at one layer it is that layer which is found, the last that does not exceed
        it.

        Args:
            policy: a policy of one stage, unless `schedule` is given.
            price: the price.
            schedule: returns the policy of several stages for a budget; None: `policy.with_keep`.
        """
        if policy.scorer == "visual-exit":
            exits = (replace(policy, scorer_args={"layer": at}) for at in range(self.prices.depth - 1, 0, -1))
            return next((one for one in exits if self.share(price.unit, one) <= price.share), None)
        inside = any(place.layer for place in places(policy.steps(), self.prices.depth))
        same = (policy.scorer, repr(policy.scorer_args)) if inside else None  # at the entry all pay the same
        key, at = (price, schedule or same), schedule or policy.with_keep
        if key not in self._found:
            self._found[key] = largest(lambda keep: self.share(price.unit, at(keep)), price.share)
        keep = self._found[key]
        return None if keep is None else at(keep)

    def why_not(self, *policies: PruningPolicy, price: Price) -> str:
        """Return why none of some policies can pay a price: what they pay with one token, or with the first layer."""
        exit_ = any(policy.scorer == "visual-exit" for policy in policies)
        least = min(
            self.share(price.unit, replace(one, scorer_args={"layer": 1}) if exit_ else replace(one, keep=1))
            for one in policies
        )
        how = "where all tokens leave at layer 1" if exit_ else "with one token"
        return f"{how} it pays {least:.3g} of {price.unit} already."


def schedule_text(policy: PruningPolicy, depth: int, named: bool) -> str:
    """Return where tokens leave and how many stay, in a few words; `named`: with the names of methods.

    >>> schedule_text(PruningPolicy("fastv", {"layer": 3}, keep=0.07), 12, named=False)
    '0.07 at layer 3'
    """
    parts: list[str] = []
    for stage in policy.stages:
        if stage.everything:
            continue
        at = [place.layer for place in places([stage.step()], depth)]
        where = "" if at == [0] else f" at layer{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}"
        left = "none" if stage.scorer == "visual-exit" else f"{stage.keep:.3g}"
        own = f"{_method(stage, policy.routes if not parts else None)} " if named and left != "none" else ""
        parts.append(f"{own}{left}{where}")
    return ", ".join(parts) or "all"


def _method(stage: Stage, routes: Mapping[str, Any] | None) -> str:
    """Return the names of a stage's scorer and selector, and of the other rules that a question may choose."""
    rules = [{"scorer": stage.scorer, "selector": stage.selector}, *(routes or {}).get("rules", ())]
    return " or ".join(dict.fromkeys("+".join(filter(None, (rule["scorer"], rule.get("selector")))) for rule in rules))
