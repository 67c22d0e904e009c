"""Schedules: methods that drop visual tokens one after the other, at the decoder's input and inside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from catp_lightning.errors import PolicyError
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.method import Method
from catp_lightning.methods.observation import Observation
from catp_lightning.methods.scorers import SCORERS


@dataclass(frozen=True)
class Step:
    """A method with its budget.

    Attributes:
        method: scores and selects.
        keep: tokens that stay, a share of those before the first step or a number.
    """

    method: Method
    keep: int | float

    @property
    def everything(self) -> bool:
        """True for a share of 1.0, under which nothing leaves."""
        return isinstance(self.keep, float) and self.keep == 1.0


@dataclass(frozen=True)
class Place:
    """Layer at whose entry a step drops tokens; a step has several if its scorer has several stages.

    Attributes:
        layer: number of the layer; 0: tokens leave before the first.
        step: what drops them.
        stage: which of the scorer's own stages it is, from 0.
        stages: number of the scorer's own stages.
    """

    layer: int
    step: Step
    stage: int = 0
    stages: int = 1

    def counts(self, tokens: Tensor, seen: Observation) -> Tensor:
        """Return how many tokens of each sample stay, int64 [B], inside the decoder.

        Args:
            tokens: int64 [B], number of tokens of each sample before the first step.
            seen: the signals at the place.
        """
        return self.step.method.scorer.stage_counts(self.step.keep, tokens, self.stage, self.stages, seen)


def places(steps: Sequence[Step], depth: int) -> tuple[Place, ...]:
    """Return where the steps of a schedule drop tokens, in order.

    Args:
        steps: the steps.
        depth: number of layers of the decoder.

    Raises:
        PolicyError: a step would come after a later layer, or two at one.
    """
    found: list[Place] = []
    for step in steps:
        layers = step.method.scorer.stages(depth)
        found += [Place(at, step, number, len(layers)) for number, at in enumerate(layers)] or [Place(0, step)]
    for before, after in pairwise(found):
        if before.layer >= after.layer:
            first, then = (SCORERS.name_of(place.step.method.scorer) for place in (before, after))
            raise PolicyError(
                f"The stages of a policy drop tokens at ascending layers: {first!r} drops them at layer {before.layer} "
                f"of {depth}, and {then!r} after it at layer {after.layer}. Layer 0 is the decoder's input. Change "
                "their order, or the layers in scorer_args."
            )
    return tuple(found)


def visits(steps: Sequence[Step], tokens: int, depth: int) -> tuple[int, ...]:
    """Return how many of a sample's visual tokens each layer reads under a schedule, without running a model.

    Steps with a share of 1.0 are left out, as in pruning.

    Args:
        steps: the steps.
        tokens: number of visual tokens of the sample, of one image.
        depth: number of layers of the decoder.

    Raises:
        PolicyError: how many stay depends on the prompt, or as `places`.

    >>> from catp_lightning.methods.scorers import FastV
    >>> from catp_lightning.methods.selectors import TopK
    >>> visits([Step(Method(FastV(layer=2), TopK()), 0.25)], tokens=64, depth=4)
    (64, 64, 16, 16)
    """
    there = torch.ones(1, tokens, dtype=torch.bool, device="cpu")
    counts, left = [tokens] * depth, tokens
    for place in places([step for step in steps if not step.everything], depth):
        scorer = place.step.method.scorer
        if scorer.adaptive:
            raise PolicyError(
                f"How many tokens {SCORERS.name_of(scorer)!r} keeps depends on the prompt, so its price is known only "
                "once prompts were read."
            )
        if place.layer == 0:
            own = keep_count(place.step.keep, tokens)
        else:
            own = int(place.counts(torch.tensor([tokens], dtype=torch.int64, device="cpu"), Observation(there, {})))
        left = min(left, own)
        counts[place.layer :] = [left] * (depth - place.layer)
    return tuple(counts)
