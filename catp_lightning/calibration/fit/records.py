"""Records of the probes of each sample, for a network that cannot be fitted from sums."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from catp_lightning.calibration.sums import Sums

MOST = 2048
"""Most samples that are recorded, in each pass: those with the smallest checksums, whoever has read them."""


@dataclass  # not frozen: torchmetrics copies what a metric computes field by field
class Recorded:
    """N samples with T_1 to T_N visual tokens, R in all; S sizes of P probes each, C and F components.

    Attributes:
        keys: int64 [N], checksums.
        folds: int64 [N], fold of each sample's image.
        counts: int64 [N], number of tokens of each sample.
        question: float32 [N, C], components of each sample's question.
        features: float32 [R, F], components of each token, sample after sample.
        kept: bool [R, S, P], tokens that a probe kept.
        gain: float32 [N, S, P], mean log-probability of the unpruned answer's tokens, at least -3.
    """

    keys: Tensor
    folds: Tensor
    counts: Tensor
    question: Tensor
    features: Tensor
    kept: Tensor
    gain: Tensor

    def at(self, index: Tensor) -> "Recorded":
        """Return some of the samples: index is int64 of any length."""
        starts, counts = self.counts.cumsum(0) - self.counts, self.counts[index]
        first = (starts[index] - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        tokens = first + torch.arange(len(first), dtype=torch.int64, device=first.device)
        return Recorded(
            self.keys[index],
            self.folds[index],
            counts,
            self.question[index],
            self.features[tokens],
            self.kept[tokens],
            self.gain[index],
        )

    def joined(self, other: "Recorded") -> "Recorded":
        """Return the samples of both, each as often as it is in them."""
        own, others = vars(self), vars(other)
        return Recorded(**{name: torch.cat([own[name], others[name]]) for name in own})


class ProbeRecords(Sums):
    """Probes of the `MOST` samples with the smallest checksums.

    Which samples these are does not depend on the order or the number of processes in which they are read.

    Args:
        features: number of components of a token.
        question: number of components of a question.
        sizes: number of sizes.
        probes: number of probes at each size.
    """

    def __init__(self, features: int, question: int, sizes: int, probes: int, **kwargs: Any) -> None:
        super().__init__(compute_with_cache=False, **kwargs)
        number, real = partial(torch.zeros, dtype=torch.int64), partial(torch.zeros, dtype=torch.float32)
        self._empty = Recorded(
            keys=number(0, device="cpu"),
            folds=number(0, device="cpu"),
            counts=number(0, device="cpu"),
            question=real(0, question, device="cpu"),
            features=real(0, features, device="cpu"),
            kept=torch.zeros(0, sizes, probes, dtype=torch.bool, device="cpu"),
            gain=real(0, sizes, probes, device="cpu"),
        )
        for name in vars(self._empty):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.update(self._empty)  # a process may have no batch

    def update(self, samples: Recorded) -> None:
        """Add samples."""
        every = _smallest(self._recorded().joined(samples))
        for name, part in vars(every).items():
            setattr(self, name, [part])

    def compute(self) -> Recorded:
        """Return the samples of all processes in the order of their checksums, on the CPU."""
        found = _smallest(self._recorded())
        return Recorded(**{name: part.cpu() for name, part in vars(found).items()})

    def _recorded(self) -> Recorded:
        """Return what the states hold: lists of tensors, or, reduced over processes, tensors."""
        parts = {name: getattr(self, name) for name in vars(self._empty)}
        empty = {name: value.to(self.device) for name, value in vars(self._empty).items()}
        return Recorded(
            **{
                name: torch.cat([empty[name], *part]) if isinstance(part, list) else part
                for name, part in parts.items()
            }
        )


def _smallest(samples: Recorded) -> Recorded:
    """Return at most `MOST` samples, in the order of their checksums."""
    return samples.at(samples.keys.argsort(stable=True)[:MOST])
