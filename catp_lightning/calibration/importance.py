"""Probes: what keeping a token is worth to the unpruned model's own answer.

Random subsets of a sample's tokens are kept, by the same dropping that a policy uses, and the log-probability of the
unpruned answer is measured under each. A probe's row says what was kept: the sum over kept tokens of the votes of every
attention head, and how many tokens of each slot there were. A regression on these rows is linear in the head weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay import Replay
from catp_lightning.choosing import images_to_samples
from catp_lightning.counts import keep_count
from catp_lightning.fingerprint import mix, uniform
from catp_lightning.observation import Observation
from catp_lightning.scorers import AttentionScorer
from catp_lightning.selectors import without_autocast

PROBES = 24
"""Random subsets of each sample at each size."""

SMALL = (0.25, 0.125, 0.0625)
"""Sizes probed beside the budgets: where little is kept, answers change, and there is something to learn."""

WORST = -3.0  # mean log-probability; below (5%) an answer is lost, and how far it is lost says nothing but noise


@dataclass(frozen=True)
class Columns:
    """Where things stand in a probe's row: first the heads of each voter, layer by layer, then the slots.

    Attributes:
        voters: by name, the layers that vote and how many heads each has.
        slots: places of an image's tokens; 0 where they mean nothing by themselves.
    """

    voters: Mapping[str, tuple[tuple[int, ...], int]]
    slots: int

    @classmethod
    def of(cls, plan: Plan) -> "Columns":
        return cls({name: (tuple(plan.voting(name)), plan.heads(name)) for name in plan.voters}, plan.slots)

    @property
    def total(self) -> int:
        return sum(len(layers) * heads for layers, heads in self.voters.values()) + self.slots

    def of_voter(self, name: str) -> list[list[int]]:
        """The columns of a voter's heads, a list for each of its layers."""
        before = list(self.voters)[: list(self.voters).index(name)]
        start = sum(len(self.voters[other][0]) * self.voters[other][1] for other in before)
        layers, heads = self.voters[name]
        return [[start + place * heads + head for head in range(heads)] for place in range(len(layers))]

    def of_heads(self, name: str, layers: Sequence[int]) -> list[int]:
        """The columns of a voter's heads in some layers."""
        places = [self.voters[name][0].index(layer) for layer in layers]
        return [column for place in places for column in self.of_voter(name)[place]]

    @property
    def of_slots(self) -> list[int]:
        return list(range(self.total - self.slots, self.total))


def sizes(budgets: Sequence[int | float], tokens: int | None) -> list[float]:
    """Shares of tokens that probes keep, largest first: every budget, and some smaller sizes, never everything.

    Args:
        budgets: to be chosen for.
        tokens: of each image; None: images differ, and budgets in tokens are not probed themselves.

    >>> sizes([0.5], 32), sizes([0.5, 3], 32), sizes([0.4, 3], None)
    ([0.5, 0.25, 0.125, 0.0625], [0.5, 0.25, 0.125, 0.09375, 0.0625], [0.4, 0.25, 0.125, 0.0625])
    """
    if tokens is None:
        return sorted({keep for keep in (*budgets, *SMALL) if isinstance(keep, float)} - {1.0}, reverse=True)
    wanted = {keep_count(keep, tokens) for keep in (*budgets, *SMALL)} - {tokens}
    return [count / tokens for count in sorted(wanted, reverse=True)]


@dataclass(frozen=True)
class Probes:
    """The probes of some samples at one size.

    Attributes:
        rows: float [P, B, F], as `Columns` orders them.
        slots: float [P, B, T'], how many tokens of each slot were kept: the last columns of `rows`.
        gain: float [P, B], mean log-probability of the unpruned answer's tokens, -3 at least.
    """

    rows: Tensor
    slots: Tensor
    gain: Tensor


def probe(
    replay: Replay,
    votes: Tensor,
    images: Tensor,
    size: float,
    number: int,
    per: int = 0,
    owner: Tensor | None = None,
    stay: Tensor | None = None,
) -> Probes:
    """Measure `PROBES` random subsets of each sample.

    Args:
        replay: of the samples.
        votes: float [B, T, V], of every voter's heads, for each visual token.
        images: int64 [B], fingerprints: with the question they seed the draws, so that batches and ranks do not matter.
        size: share of each image's tokens to keep, on average over several images.
        number: of the size, so that sizes draw apart.
        per: slots of an image; 0: none are told apart.
        owner: as in `random_subset`.
        stay: bool [B, T], tokens that stay whatever the budget; None: none.
    """
    visual = replay.tokens if stay is None else replay.tokens & ~stay
    counts = (visual.sum(1) * size).round().long().clamp(min=1)
    seeds = images ^ replay.questions
    keep = torch.stack([random_subset(seeds, visual, counts, PROBES * number + n, owner) for n in range(PROBES)])
    keep = keep if stay is None else keep | stay
    slots = keep.unflatten(2, (-1, per)).sum(2).to(votes.dtype) if per else votes.new_zeros(*keep.shape[:2], 0)
    with without_autocast(votes):
        rows = torch.cat([torch.einsum("pbt,btv->pbv", keep.to(votes.dtype), votes), slots], 2)
    return Probes(rows, slots, floored(replay.answer_log_probability(keep)))


def floored(log_probability: Tensor) -> Tensor:
    """`WORST` at least, and where it is not a number: lost as well."""
    return log_probability.nan_to_num(nan=WORST).clamp(min=WORST)


def head_votes(voters: Iterable[AttentionScorer], seen: Observation, visual: Tensor) -> Tensor:
    """What every voter's heads say of each visual token, in float32 at least: bool [B, T] -> float [B, T, V].

    A vote that is not a number counts as 0.
    """
    with without_autocast(visual):
        all_ = [voter.votes(seen).flatten(1, 2).transpose(1, 2) for voter in voters]
    votes = torch.cat(all_, 2) if all_ else torch.zeros(*seen.valid.shape, 0, device=visual.device, dtype=torch.float32)
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
    return images_to_samples(votes, seen.valid, visual, 0.0)


def random_subset(seeds: Tensor, visual: Tensor, counts: Tensor, number: int, owner: Tensor | None = None) -> Tensor:
    """The `number`-th random subset of each sample.

    Args:
        seeds: int64 [B], of each sample.
        visual: bool [B, T], which visual tokens it has.
        counts: int64 [B], how many to keep.
        number: of the subset.
        owner: int64 [B, T], a number for the image of each token: one token of each is kept in any case; None: images
            may lose all.

    Returns:
        bool [B, T].
    """
    draws = uniform(mix(seeds + mix(torch.tensor(number, device=seeds.device, dtype=torch.int64))), visual.shape[1])
    draws = draws.masked_fill(~visual, 2)
    kept = draws.argsort(1).argsort(1) < counts[:, None]
    if owner is not None:
        least = draws.new_full((int(owner.max()) + 1,), 2).scatter_reduce(0, owner[visual], draws[visual], "amin")
        kept = kept | (visual & (draws == least[owner]))
    return kept
