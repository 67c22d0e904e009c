"""What policies cost on the samples of a calibration, and what may stay at a price."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from catp_lightning.calibration.plan import Plan
from catp_lightning.errors import PolicyError
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.schedule import Step, places
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.policy import PruningPolicy
from catp_lightning.pricing import COUNTED, PrefillProfile, Prices, Prompts, Unit, largest, tokens_read
from catp_lightning.pricing.profile import between
from catp_lightning.utils.messages import rank_zero_warn

TIME = "prefill_time"


class Stop(NamedTuple):
    """Layer at whose entry tokens leave, 0 for the decoder's input, and the share of a sample's tokens that stays."""

    layer: int
    keep: float


@dataclass(frozen=True)
class Payments:
    """Mean price of policies over the samples of a calibration, as a share of what the unpruned model pays.

    Attributes:
        unit: what is paid.
        prices: prices of the model that are counted.
        prompts: sizes of the samples' prompts.
        profile: seconds of the prefill, if they are known; the unit may be "prefill_time" only then.
    """

    unit: str
    prices: Prices
    prompts: Prompts
    profile: PrefillProfile | None = None

    @classmethod
    def of_samples(cls, plan: Plan, sizes: Tensor) -> "Payments":
        """Return the payments of a plan's unit on samples of these sizes, int64 [N, 4], as `Replay.sizes`.

        Raises:
            PruningError: the unit is not known for the model.
        """
        prices = Prices.of(plan.family)
        assert plan.unit is not None
        if plan.unit != TIME:
            prices.check(cast(Unit, plan.unit))
        return cls(plan.unit, prices, Prompts(*sizes.unbind(1)), plan.profile)

    def of(self, policy: PruningPolicy) -> dict[str, float]:
        """Return the price of a policy in every unit that is known for the model.

        Raises:
            PolicyError: how many tokens stay depends on the prompt.
        """
        steps = policy.steps()
        read = tokens_read(steps, self.prompts.tokens, self.prices.depth)
        known = [unit for unit in COUNTED if unit not in self.prices.unknown]
        found: dict[str, float] = {unit: self.prices.share(unit, self.prompts, read) for unit in known}
        return found if self.profile is None else {**found, TIME: self._time_of(policy, self.profile, read)}

    def paid(self, stops: Sequence[Stop]) -> float:
        """Return the price of dropping tokens at these places, by the dearest of the methods that may choose them."""
        different, at = self.prompts.tokens.unique(return_inverse=True)
        rows = [self._left(stops, tokens) for tokens in different.tolist()]
        read = torch.tensor(rows, dtype=torch.int64, device=at.device)[at]
        return self._share(read, [stop.layer for stop in stops])

    def most(self, stops: Callable[[float], Sequence[Stop]], budget: float) -> float | None:
        """Return the largest share whose places `stops` cost no more than a price; None if even the least costs more.

        Args:
            stops: places for a share; the price grows with it.
            budget: the price.
        """
        return largest(lambda share: self.paid(stops(share)), budget)

    def most_of(self, policy: Callable[[float], PruningPolicy], budget: float) -> float | None:
        """Return the largest `keep` at which a policy costs no more than a price; None if even the least costs more."""
        return largest(lambda keep: self._paid_by(policy(keep).steps()), budget)

    def reachable(
        self, policy: Callable[[float], PruningPolicy], budgets: Sequence[float], some: bool
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the prices that can be met, and for each the largest `keep` at which a policy costs no more.

        Args:
            policy: the policy at a `keep`.
            budgets: the prices.
            some: True if it is enough that some can be met.

        Raises:
            PolicyError: a price cannot be met even with one token of each image.
        """
        found = {budget: self.most_of(policy, budget) for budget in budgets}
        missed = [budget for budget, keep in found.items() if keep is None]
        if missed and not (some and len(missed) < len(found)):
            raise PolicyError(
                f"A budget of {min(missed):g} of {self.unit} cannot be met here: with one visual token an image, the "
                f"rest still costs {self._paid_by(policy(1).steps()):.3f} of what the unpruned model pays. Ask for "
                "more than that."
            )
        if missed:
            rank_zero_warn(
                f"budget: {', '.join(f'{price:g}' for price in missed)} of {self.unit} cannot be met even with one "
                "visual token an image, and is not tried."
            )
        met = {budget: keep for budget, keep in found.items() if keep is not None}
        return tuple(met), tuple(met.values())

    def _paid_by(self, steps: Sequence[Step]) -> float:
        layers = [place.layer for place in places([one for one in steps if not one.everything], self.prices.depth)]
        return self._share(tokens_read(steps, self.prompts.tokens, self.prices.depth), layers)

    def _left(self, stops: Sequence[Stop], tokens: int) -> tuple[int, ...]:
        counts, left = [tokens] * self.prices.depth, tokens
        for stop in stops:
            left = min(left, keep_count(stop.keep, tokens)) if stop.keep else 0
            counts[stop.layer :] = [left] * (len(counts) - stop.layer)
        return tuple(counts)

    def _share(self, read: Tensor, layers: Sequence[int]) -> float:
        """Return the price if layers read `read`, int64 [N, depth], and tokens are chosen at the entry of `layers`."""
        if self.unit != TIME or self.profile is None:
            return self.prices.share(cast(Unit, self.unit), self.prompts, read)
        seconds = self.profile.seconds(self.prompts, read).sum()
        choosing = sum(self._dearest(self.profile, layer > 0, read[:, layer]) for layer in layers)
        return float((seconds + choosing) / self.profile.seconds(self.prompts).sum())

    def _dearest(self, profile: PrefillProfile, inside: bool, left: Tensor) -> float:
        """Return the seconds in which the dearest method of a profile, inside the decoder or not, keeps tokens."""
        costs = [
            between(points, left).sum().item()
            for name, points in profile.costs.items()
            if bool(SCORERS[name.partition(" with ")[0]]().stages(self.prices.depth)) == inside
        ]
        return max([0.0, *costs])

    def _time_of(self, policy: PruningPolicy, profile: PrefillProfile, read: Tensor) -> float:
        try:
            return profile.share(policy, self.prompts)
        except PolicyError:  # not among the methods that were measured
            layers = [place.layer for place in places(policy.steps(), self.prices.depth)]
            return replace(self, unit=TIME)._share(read, layers)
