"""Probes: measure the value of keeping a token for the unpruned model's own answer.

Random subsets of a sample's tokens are kept, by the same dropping that a policy uses, and the log-probability of the
unpruned answer is measured under each. A probe's row describes what was kept: for every attention head the sum of its
scores over the kept tokens, and for every slot the number of kept tokens. A regression on these rows is linear in the
head weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.observation import Observation
from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.scorers import AttentionScorer
from catp_lightning.methods.selection import images_to_samples
from catp_lightning.utils.hashing import mix, uniform

WORST = -3.0  # mean log-probability; below it (5%) an answer is lost, and further decrease is noise


@dataclass(frozen=True)
class Columns:
    """Column layout of a probe's row: first the heads of each scorer, layer by layer, then the slots.

    Attributes:
        scorers: by name, the layers that are read and the number of heads of a layer.
        slots: number of slots, places of an image's tokens; 0 where a place alone has no meaning.
    """

    scorers: Mapping[str, tuple[tuple[int, ...], int]]
    slots: int

    @classmethod
    def of(cls, plan: Plan) -> "Columns":
        """Return the columns of a plan."""
        return cls({name: (tuple(plan.layers_read(name)), plan.heads(name)) for name in plan.scorers}, plan.slots)

    @property
    def total(self) -> int:
        """Number of all columns."""
        return sum(len(layers) * heads for layers, heads in self.scorers.values()) + self.slots

    def of_scorer(self, name: str) -> list[list[int]]:
        """Return the columns of a scorer's heads, a list for each of its layers."""
        before = list(self.scorers)[: list(self.scorers).index(name)]
        start = sum(len(self.scorers[other][0]) * self.scorers[other][1] for other in before)
        layers, heads = self.scorers[name]
        return [[start + place * heads + head for head in range(heads)] for place in range(len(layers))]

    def of_heads(self, name: str, layers: Sequence[int]) -> list[int]:
        """Return the columns of a scorer's heads in the given layers."""
        places = [self.scorers[name][0].index(layer) for layer in layers]
        return [column for place in places for column in self.of_scorer(name)[place]]

    @property
    def of_slots(self) -> list[int]:
        return list(range(self.total - self.slots, self.total))


def sizes(budgets: Sequence[int | float], tokens: int | None, wanted: Sequence[float] = DEFAULTS.sizes) -> list[float]:
    """Return the shares of tokens that probes keep, largest first: those wanted, and budgets below the largest of them.

    Args:
        budgets: budgets that are calibrated.
        tokens: number of tokens of each image; None: images differ, and budgets in tokens are not probed themselves.
        wanted: shares that are probed whatever the budgets.

    >>> sizes([0.5], 32), sizes([0.5, 3], 32), sizes([0.4, 0.05, 3], None)
    ([0.25, 0.125, 0.0625], [0.25, 0.125, 0.09375, 0.0625], [0.25, 0.125, 0.0625, 0.05])
    """
    if tokens is None:
        found = {keep for keep in (*budgets, *wanted) if isinstance(keep, float)}
    else:
        found = {keep_count(keep, tokens) / tokens for keep in (*budgets, *wanted)}
    largest = max((keep if tokens is None else keep_count(keep, tokens) / tokens for keep in wanted), default=1.0)
    return sorted((keep for keep in found if keep <= largest and keep < 1), reverse=True)


@dataclass(frozen=True)
class Probes:
    """Result of P probes of each of B samples at one size.

    Attributes:
        rows: float [P, B, F], in the F columns of `Columns`.
        slots: float [P, B, T'], number of kept tokens of each of T' slots: the last columns.
        kept: bool [P, B, T], tokens that were kept.
        gain: float [P, B], mean log-probability of the unpruned answer's tokens, at least -3.
    """

    rows: Tensor
    slots: Tensor
    kept: Tensor
    gain: Tensor


def probe(
    replay: Replay,
    head_scores: Tensor,
    images: Tensor,
    size: float,
    number: int,
    per: int = 0,
    owner: Tensor | None = None,
    stay: Tensor | None = None,
    probes: int = DEFAULTS.probes,
    scores: Tensor | None = None,
) -> Probes:
    """Measure random subsets of each sample's visual tokens.

    Args:
        replay: replay of the samples.
        head_scores: float [B, T, V], scores of the scorers' heads, V in all, for each visual token.
        images: int64 [B], fingerprints: with the question they seed the draws, so that batches and ranks do not matter.
        size: share of each image's tokens to keep, on average over several images.
        number: index of the size, so that each size has draws of its own.
        per: number of slots of an image; 0: slots are not counted.
        owner: image of each token, as in `random_subset`.
        stay: bool [B, T], protected tokens, which stay whatever the budget; None: none.
        probes: number of subsets of each sample.
        scores: float [B, T], as in `random_subset`.
    """
    visual = replay.tokens if stay is None else replay.tokens & ~stay
    counts = (visual.sum(1) * size).round().long().clamp(min=1)
    seeds = images ^ replay.questions
    draws = range(probes * number, probes * (number + 1))
    keep = torch.stack([random_subset(seeds, visual, counts, draw, owner, scores) for draw in draws])
    keep = keep if stay is None else keep | stay
    slots = head_scores.new_zeros(*keep.shape[:2], 0)
    slots = keep.unflatten(2, (-1, per)).sum(2).to(slots) if per else slots
    with without_autocast(head_scores):
        rows = torch.cat([torch.einsum("pbt,btv->pbv", keep.to(head_scores.dtype), head_scores), slots], 2)
    return Probes(rows, slots, keep, floored(replay.answer_log_probability(keep)))


def floored(log_probability: Tensor) -> Tensor:
    """Raise log-probabilities below `WORST` to it; NaN becomes `WORST` too, as a lost answer."""
    return log_probability.nan_to_num(nan=WORST).clamp(min=WORST)


def scores_of_heads(scorers: Iterable[AttentionScorer], seen: Observation, visual: Tensor) -> Tensor:
    """Return the scores of all scorers' heads, V in all, for each visual token: bool [B, T] -> float [B, T, V].

    They are float32 or float64. One that is NaN or infinite counts as 0.
    """
    with without_autocast(visual):
        found = [scorer.head_scores(seen).flatten(1, 2).transpose(1, 2) for scorer in scorers]
    none = torch.zeros(*seen.valid.shape, 0, device=visual.device, dtype=torch.float32)
    together = torch.cat(found, 2) if found else none
    together = together.to(torch.promote_types(together.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
    return images_to_samples(together, seen.valid, visual, 0.0)


def random_subset(
    seeds: Tensor,
    visual: Tensor,
    counts: Tensor,
    number: int,
    owner: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Draw the `number`-th random subset of each sample's visual tokens.

    Args:
        seeds: int64 [B], seed of each sample.
        visual: bool [B, T], visual tokens of each sample.
        counts: int64 [B], number of tokens to keep.
        number: index of the subset.
        owner: int64 [B, T], a number for the image of each token: at least one token of each image is kept; None:
            images may lose all tokens.
        scores: float [B, T]: tokens are drawn one after the other with probabilities proportional to exp(score), as in
            the Plackett-Luce model, by the Gumbel trick (1903.06059); None: all subsets are equally likely.

    Returns:
        bool [B, T], True for kept tokens.
    """
    draws = uniform(mix(seeds + mix(torch.tensor(number, device=seeds.device, dtype=torch.int64))), visual.shape[1])
    if scores is not None:
        draws = -(scores - (-(1 - draws.to(scores.dtype)).log()).clamp(min=1e-9).log())
    draws = draws.masked_fill(~visual, torch.inf)
    kept = draws.argsort(1).argsort(1) < counts[:, None]
    if owner is not None:
        least = draws.new_full((int(owner.max()) + 1,), torch.inf).scatter_reduce(
            0, owner[visual], draws[visual], "amin"
        )
        kept = kept | (visual & (draws == least[owner]))
    return kept


def pair_rows(slots: Tensor) -> Tensor:
    """Return the products of kept counts of all pairs of T slots, i <= j: float [..., T] -> [..., T (T + 1) / 2]."""
    first, second = torch.triu_indices(slots.shape[-1], slots.shape[-1])
    return slots[..., first] * slots[..., second]
