"""Selection of the visual tokens that stay, and regrouping of values between images and samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.methods.observation import Observation
from catp_lightning.utils.on_cpu import known, of_known, on_cpu, on_device


@dataclass(frozen=True)
class Selection:
    """Visual tokens that stay; R rows, of images or samples, T visual tokens of the largest.

    Attributes:
        keep: bool [R, T], True for tokens that stay.
        destination: int64 [R, T], for each token the one it is merged into, as in ToMe (2210.09461): itself if it
            stays, -1 if it is dropped. A token that stays becomes the mean of all that are merged into it. None:
            nothing is merged.
        scores: float [R, T], scores that the tokens were ranked by; -inf where a row has no token; None: nothing was
            scored.
        rows: float [R, T, D], what the language model reads in the place of each token that stays; None: the tokens
            themselves, or means of what is merged into them.
    """

    keep: Tensor
    destination: Tensor | None = None
    scores: Tensor | None = None
    rows: Tensor | None = None

    def of_rows(self, index: Tensor, tokens: int) -> "Selection":
        """Return the selection of some of the rows, int64 [R'], which have at most `tokens` tokens."""
        keep, *others = (
            None if part is None else part[index, :tokens]
            for part in (self.keep, self.destination, self.scores, self.rows)
        )
        assert keep is not None
        return Selection(keep, *others)

    def with_protected(self, stay: Tensor) -> "Selection":
        """Return the selection with more tokens that stay, which nothing is merged into: bool [R, T]."""
        keep, destination = self.keep | stay, self.destination
        if destination is not None:
            destination = own_destination(keep).where(stay, destination)
        return Selection(keep, destination, self.scores, self.rows)


def own_destination(kept: Tensor) -> Tensor:
    """Return destinations where each kept token is its own and nothing is merged: bool [R, T] -> int64 [R, T]."""
    return torch.arange(kept.shape[1], device=kept.device).expand_as(kept).masked_fill(~kept, -1)


def images_to_samples(values: Tensor, valid: Tensor, visual: Tensor, fill: float | bool) -> Tensor:
    """Regroup per-image values [I, T', ...] into per-sample rows [B, T, ...], padded with `fill`.

    Args:
        values: [I, T', ...].
        valid: bool [I, T'], the tokens that each image has.
        visual: bool [B, T], the visual tokens that each sample has.
        fill: value where a sample has no token.
    """
    own, there = on_cpu(valid, visual)
    if values.numel() == 0 or not own.any():
        return values.new_full((*visual.shape, *values.shape[2:]), fill)
    at = torch.zeros(there.shape, dtype=torch.int64, device="cpu")
    at[there] = own.flatten().nonzero()[:, 0]  # of each visual token, among those of all images

    def regrouped(flat: Tensor, at: Tensor, there: Tensor) -> Tensor:
        return flat[at].masked_fill(~there.view(*there.shape, *[1] * (flat.dim() - 1)), fill)

    if known(values):
        return on_device(regrouped(on_cpu(values)[0].flatten(0, 1), at, there), values.device)
    return regrouped(values.flatten(0, 1), on_device(at, values.device), on_device(there, values.device))


def sample_of_images(valid: Tensor, visual: Tensor) -> Tensor:
    """Return the index of the sample that each image belongs to: bool [I, T'], bool [B, T] -> int64 [I]."""

    def found(valid: Tensor, visual: Tensor) -> Tensor:
        return torch.bucketize(valid.sum(1).cumsum(0) - 1, visual.sum(1).cumsum(0), right=True)

    return of_known(found, valid, visual)


def protected_tokens(seen: Observation, visual: Tensor) -> Tensor:
    """Return the protected visual tokens, which stay whatever the budget: bool [B, T]."""
    kept = of_known(lambda valid, free: valid & ~free, seen.valid, seen.droppable)
    return images_to_samples(kept, seen.valid, visual, False)
