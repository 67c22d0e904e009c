"""What was kept of a sample, and where it lies in the sample's images: all that pictures are drawn from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.selection import Selection, sample_of_images
from catp_lightning.models import Family
from catp_lightning.models.images import Part
from catp_lightning.prompt.prompt import Prompt
from catp_lightning.utils.on_cpu import on_cpu


@dataclass(frozen=True)
class Kept:
    """Choice at one layer among the N visual tokens that a sample had before any was dropped, on the CPU.

    Attributes:
        layer: number of the decoder layer at whose entry tokens left; 0: before the first.
        keep: bool [N], tokens that are there from this layer on.
        scores: float [N], scores that the tokens were ranked by; None if nothing was scored.
        destination: int64 [N], for each token the one that it was merged into, itself if it stays, -1 if it is dropped;
            None if nothing was merged.
    """

    layer: int
    keep: Tensor
    scores: Tensor | None = None
    destination: Tensor | None = None


@dataclass(frozen=True)
class Shown:
    """What was kept of one sample, and where it lies in its images, on the CPU; N visual tokens in placeholder order.

    Attributes:
        images: parts of each image or frame: size of their grids, pixels and how they lie side by side.
        image: int64 [N], number of the image that each token is of.
        places: int64 [N, 3], part, row and column of each token's patch; row and column are -1 if it stands for none.
        stages: the choice at each layer at which tokens left, in order; one at least.
        attention: float [N, rows, columns], attention that a query token pays to the patches of its image, the mean
            over layers and heads of the cross-attention; None where tokens stand for patches.
    """

    images: tuple[tuple[Part, ...], ...]
    image: Tensor
    places: Tensor
    stages: tuple[Kept, ...]
    attention: Tensor | None = None

    @property
    def drawable(self) -> bool:
        """True if a token stands for a patch or, a query token, attends to patches."""
        return bool(len(self.image)) if self.attention is not None else bool((self.places[:, 1] >= 0).any())

    @property
    def last(self) -> Kept:
        """The choice at the last layer at which tokens left."""
        return self.stages[-1]


class Viewer:
    """Viewer of one model's prefills, which puts together what each sample keeps and where that lies.

    Args:
        family: the model's family.

    Attributes:
        active: False if prefills are not to be noted.
    """

    def __init__(self, family: Family) -> None:
        self._family, self.active = family, True
        self._queries = Signal.CROSS_ATTENTION in family.layers()
        self._shown: tuple[Shown, ...] = ()
        self._columns: list[Tensor] = []  # of each sample's tokens among those of the largest sample

    @property
    def needs(self) -> Needs:
        """Signals that say where tokens lie: of query tokens the patches that they attend to."""
        return {Signal.CROSS_ATTENTION if self._queries else Signal.PATCH_POSITION: None}

    def taken(self) -> tuple[Shown, ...]:
        """Return what was noted of the samples of the running prefill, and forget it."""
        found, self._shown = self._shown, ()
        return found

    def see(self, prompt: Prompt, selection: Selection, layer: int, take: Callable[[Prompt], Observation]) -> None:
        """Note what a prompt keeps from a layer on; `take` returns the signals of the prompt's images."""
        if prompt.stage == 0:
            (visual,) = on_cpu(prompt.tokens)
            self._columns = [row.nonzero()[:, 0] for row in visual]
            self._shown = self._samples(prompt, take(prompt), visual) if bool(visual.any()) else ()
        (keep,) = on_cpu(selection.keep)
        scores = None if selection.scores is None else selection.scores.detach().to("cpu", torch.float32)
        destination = None if selection.destination is None else selection.destination.to("cpu")
        self._shown = tuple(
            replace(
                shown,
                stages=(
                    *shown.stages,
                    Kept(
                        layer,
                        keep[row, columns],
                        None if scores is None else scores[row, columns],
                        None if destination is None else _renumbered(destination[row], columns),
                    ),
                ),
            )
            for row, (shown, columns) in enumerate(zip(self._shown, self._columns, strict=False))
        )

    def _samples(self, prompt: Prompt, seen: Observation, visual: Tensor) -> tuple[Shown, ...]:
        """Return each sample's images and where its tokens lie; `visual` is bool [B, T] on the CPU."""
        (valid,) = on_cpu(seen.valid)
        parts, values = self._family.parts(prompt), self._of_tokens(seen)
        samples = sample_of_images(valid, visual).tolist()
        found = []
        for row in range(len(visual)):
            own = [number for number, sample in enumerate(samples) if sample == row]
            image = torch.arange(len(own), dtype=torch.int64, device="cpu").repeat_interleave(valid[own].sum(1))
            joined = values[own][valid[own]]
            nowhere = torch.full((len(image), 3), -1, dtype=torch.int64, device="cpu")
            found.append(
                Shown(
                    tuple(tuple(map(_copied, parts[number])) for number in own),
                    image,
                    nowhere if self._queries else joined,
                    (),
                    joined if self._queries else None,
                )
            )
        return tuple(found)

    def _of_tokens(self, seen: Observation) -> Tensor:
        """Return each token's place, int64 [I, T, 3], or a query token's attention, float32 [I, T, rows, columns]."""
        if not self._queries:
            return seen[Signal.PATCH_POSITION].to("cpu")
        attention = seen.by_layer(Signal.CROSS_ATTENTION).mean((1, 2)).to("cpu", torch.float32)
        side = math.isqrt(attention.shape[2])
        return attention[..., -(side**2) :].unflatten(2, (side, side))  # without the [CLS] before the patches


def _renumbered(destination: Tensor, columns: Tensor) -> Tensor:
    """Return destinations, int64 [T] of T columns, as numbers of a sample's own N tokens: int64 [N]; -1: none."""
    numbers = torch.full((len(destination) + 1,), -1, dtype=torch.int64, device="cpu")
    numbers[columns] = torch.arange(len(columns), dtype=torch.int64, device="cpu")
    return numbers[destination[columns]]  # -1 reads the last number, which is -1


def _copied(part: Part) -> Part:
    """Return a part with a copy of its pixels on the CPU: it may be looked at when the batch is gone."""
    picture = None if part.picture is None else part.picture.detach().to("cpu", torch.float32, copy=True)
    return replace(part, picture=picture)
