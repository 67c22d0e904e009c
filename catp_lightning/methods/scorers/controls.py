"""Controls: rules that read no attention, which a method must beat to show that its scores are worth anything."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import EqualScores, Scorer, slot_scores
from catp_lightning.utils.hashing import mix, uniform
from catp_lightning.utils.on_cpu import on_cpu, on_device


@dataclass(frozen=True)
class L2Norm(Scorer):
    """Control: Euclidean norm of the token as it leaves the vision part; a baseline of 2404.08567."""

    control: ClassVar[bool] = True
    published: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return {Signal.IMAGE_FEATURES: None}

    def score(self, seen: Observation) -> Tensor:
        outputs = seen[Signal.IMAGE_FEATURES]
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).norm(dim=-1)


@dataclass(frozen=True)
class Position(Scorer):
    """Control: the first tokens (a baseline of 2404.08567), or the slots to which calibration gave the highest weights.

    Attributes:
        weights: the score of each slot, one number for each token of an image; None: the earlier, the higher.
    """

    control: ClassVar[bool] = True
    published: ClassVar[bool] = False
    weights: tuple[float, ...] | None = None

    @property
    def needs(self) -> Needs:
        return {Signal.IMAGE_HASH: None}

    def score(self, seen: Observation) -> Tensor:
        like = seen[Signal.IMAGE_HASH].new_empty((seen.images, seen.tokens), dtype=torch.float32)
        return slot_scores(range(0, -seen.tokens, -1) if self.weights is None else self.weights, like)


@dataclass(frozen=True)
class Stride(Scorer):
    """Control: evenly spaced tokens in reading order: every second token at keep 1/2, every fourth at keep 1/4.

    Where tokens are patches of an image, `grid` spreads them evenly in both directions and is the harder control.

    Tokens are ranked by their bit-reversed index (the van der Corput order), so that a smaller budget keeps a subset
    of a larger one, and every budget is spread as evenly as a nested order allows.
    """

    control: ClassVar[bool] = True
    published: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return {Signal.IMAGE_HASH: None}

    def score(self, seen: Observation) -> Tensor:
        scores = torch.zeros(seen.valid.shape, device="cpu", dtype=torch.float32)
        sizes = on_cpu(seen.valid)[0].sum(1)
        for count in sizes.unique().tolist():  # images may differ in size
            bits = max(1, (count - 1).bit_length())
            order = [-float(int(f"{index:0{bits}b}"[::-1], 2)) for index in range(count)]
            scores[sizes == count, :count] = torch.tensor(order, dtype=scores.dtype, device="cpu")
        return on_device(scores, seen.valid.device)


@dataclass(frozen=True)
class Grid(EqualScores):
    """Control: equal scores for all tokens; its selector, `grid`, keeps evenly spaced rows and columns of the image."""

    selector: ClassVar[str] = "grid"
    control: ClassVar[bool] = True
    published: ClassVar[bool] = False


@dataclass(frozen=True)
class Random(Scorer):
    """Control: random tokens, drawn from the seed and the image's pixels, not from batch, rank or decoding step.

    Attributes:
        seed: a signed 64-bit integer.
    """

    control: ClassVar[bool] = True
    published: ClassVar[bool] = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it is a whole number of 64 bits, from -2**63 to 2**63 - 1.")

    @property
    def needs(self) -> Needs:
        return {Signal.IMAGE_HASH: None}

    def score(self, seen: Observation) -> Tensor:
        images = seen[Signal.IMAGE_HASH]
        seed = torch.full((), self.seed, device=images.device, dtype=torch.int64)
        return uniform(mix(images ^ mix(seed)), seen.tokens)
