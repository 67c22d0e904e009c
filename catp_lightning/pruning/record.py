"""Record of what a `prune` context keeps, and of each prefill for those who count."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.methods.guard import Summaries
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning.shown import Shown


@dataclass(frozen=True)
class Prefill:
    """Tokens that one prefill kept; B samples, before beams are expanded, T visual tokens of the largest.

    Attributes:
        keep: bool [B, T], visual tokens that stayed.
        counts: int64 [B], visual tokens that each sample had.
        per_layer: int64 [B, depth], number of visual tokens that each layer of the decoder reads.
        images: int64 [I], fingerprints of its images, only if the policy says which images it was calibrated on and
            something is scored; else None.
        summaries: summaries of its images, if these are watched and something is scored; else None.
        text: int64 [B], rows that each sample has beside visual tokens, without padding; None where cross-attention
            reads the image.
        shown: what was kept of each of the B samples, and where it lies in its images, if that was asked for; else
            empty.
    """

    keep: Tensor
    counts: Tensor
    per_layer: Tensor
    images: Tensor | None = None
    summaries: Summaries | None = None
    text: Tensor | None = None
    shown: tuple[Shown, ...] = ()

    @property
    def tokens_per_layer(self) -> Tensor:
        """Number of visual tokens that a layer of the decoder reads, the mean over its layers: float32 [B].

        More than the number that stay if tokens are dropped inside the decoder.
        """
        return self.per_layer.to(torch.float32).mean(1)


OnPrefill = Callable[[Prefill], None]


@dataclass
class Pruning:
    """Record of what a `prune` context keeps. It only records: changing it changes nothing.

    Attributes:
        model: class name of the model.
        policy: the policy that prunes it.
        keep: bool [B, T], the visual tokens that stayed in the last prefill, in placeholder order; None before the
            first. B is the batch before beams are expanded, T the longest sample's count; False beyond a sample's own.
        scores: float [B, T], scores that the tokens were ranked by; -inf beyond a sample's own, None if nothing was
            scored.
        destination: int64 [B, T], for each visual token the one that it is merged into: itself if it stays, or one that
            stays and now is the mean of all that were merged into it, or -1 if it is dropped; None if nothing is
            merged. With several stages it is the last one's: what was dropped or merged before is -1.
        last: the last prefill; None before the first.
        prefills: number of prefills so far.
        labels_left_out: number of labels of the last call that were predicted from dropped rows: they do not count in
            its loss.
    """

    model: str
    policy: PruningPolicy
    keep: Tensor | None = None
    scores: Tensor | None = None
    destination: Tensor | None = None
    last: Prefill | None = None
    prefills: int = 0
    labels_left_out: int = 0

    @property
    def shown(self) -> tuple[Shown, ...]:
        """What the last prefill kept of each sample and where it lies in its images, for `catp_lightning.plots`.

        Empty before the first prefill, and without `prune(..., show=True)`.
        """
        return () if self.last is None else self.last.shown

    def __repr__(self) -> str:
        """Return a short description: the model, what the policy keeps, and how much the last prefill kept."""
        found = "nothing read yet"
        if self.keep is not None:
            found = f"{int(self.keep.sum()):,} visual tokens kept of a batch of {len(self.keep)}"
        policy = ", ".join(f"scorer={stage.scorer!r}, keep={stage.keep!r}" for stage in self.policy.stages)
        return f"Pruning({self.model}, {policy}: {found})"
