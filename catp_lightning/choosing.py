"""From what was observed to which tokens stay: pure tensors, shared by pruning and calibration."""

from collections.abc import Iterator

import torch
from torch import Tensor

from catp_lightning.errors import PruningError
from catp_lightning.observation import Observation
from catp_lightning.scorers import Scorer
from catp_lightning.selectors import Selector, keep_count, without_autocast


def choose_tokens(
    scores: Tensor, selector: Selector, keep: int | float, seen: Observation, visual: Tensor
) -> tuple[Tensor, Tensor]:
    """Which visual tokens stay.

    Args:
        scores: float [I, T'], a scorer's.
        selector: turns scores into a set.
        keep: the budget, of each image or of the whole sample as the selector's `per` says.
        seen: what the selector compares tokens by.
        visual: bool [B, T], which visual tokens each sample has.

    Returns:
        keep, bool [B, T], and the scores in the samples' order, float [B, T], -inf where a sample has no token.
    """
    vectors = selector.vectors(seen)
    by_sample = placed(scores, seen.exists, visual, -torch.inf)
    if selector.per == "sample":
        free = placed(seen.free, seen.exists, visual, False)
        vectors = None if vectors is None else placed(vectors, seen.exists, visual, 0.0)
        return selector.select(by_sample, free, _budget(keep, free), vectors) | (visual & ~free), by_sample
    kept = seen.exists & ~seen.free
    for part in _parts(seen, selector.per):
        kept = kept | selector.select(scores, part, _budget(keep, part), vectors)
    return placed(kept, seen.exists, visual, False), by_sample


def _parts(seen: Observation, per: str) -> Iterator[Tensor]:
    """Tokens that share a budget, in each image: bool [I, T]."""
    if per != "crop" or seen.crops is None:
        yield seen.free
        return
    for crop in range(int(seen.crops.max()) + 1):
        yield seen.free & (seen.crops == crop)


def score_tokens(scorer: Scorer, seen: Observation, visual: Tensor) -> Tensor:
    """The scorer's scores, float [I, T'], once it is certain that every image's tokens are where they should be.

    Raises:
        PruningError: the samples' placeholders do not match the images. transformers would put one sample's features
        into another.
    """
    own, images = visual.sum(1), seen.exists.sum(1)
    ends = torch.isin(own.cumsum(0), torch.cat([images.new_zeros(1), images.cumsum(0)]))
    if int(own.sum()) != int(images.sum()) or not bool(ends.all()):
        wrong = "" if bool(ends.all()) else f" (sample {int((~ends).nonzero()[0])} does not end where an image ends)"
        raise PruningError(
            f"{seen.images} images with {_counts(images)} visual tokens were read, but the samples have "
            f"{own.tolist()} placeholders{wrong}: features would reach the wrong sample. Give each sample as many "
            "image tokens as its images need."
        )
    with without_autocast(visual):
        return scorer.score(seen)


def _counts(images: Tensor) -> str:
    distinct = images.unique().tolist()
    return str(distinct[0]) if len(distinct) == 1 else str(images.tolist())


def _budget(keep: int | float, visual: Tensor) -> Tensor:
    return torch.tensor([keep_count(keep, count) for count in visual.sum(1).tolist()], device=visual.device)


def stage_counts(keep: int | float, tokens: Tensor, part: float) -> Tensor:
    """How many of each sample's `tokens`, int64 [B], stay after `part` of the stages; each drops as large a share.

    >>> stage_counts(0.125, torch.tensor([64]), 1 / 3), stage_counts(8, torch.tensor([64]), 1.0)
    (tensor([32]), tensor([8]))
    """
    last = [keep_count(keep, count) / max(1, count) for count in tokens.tolist()]
    counts = [keep_count(share**part, count) for share, count in zip(last, tokens.tolist(), strict=True)]
    return torch.tensor(counts, device=tokens.device)


def placed(values: Tensor, exists: Tensor, visual: Tensor, fill: float | bool) -> Tensor:
    """Values of images' tokens, [I, T', ...] where `exists`, put where their samples have them: [B, T, ...]."""
    found = values.new_full((*visual.shape, *values.shape[2:]), fill)
    found[visual] = values[exists]
    return found
