"""From what was observed to which tokens stay: pure tensors, shared by pruning and calibration."""

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
        scores: float [I, T'], a scorer's, in image order.
        selector: turns scores into a set.
        keep: the budget, of each image or of the whole sample as the selector's `per` says.
        seen: what the selector compares tokens by.
        visual: bool [B, T], which visual tokens each sample has; its own come first.

    Returns:
        keep, bool [B, T], and the scores in the samples' order, float [B, T], -inf where a sample has no token.
    """
    vectors = selector.vectors(seen)
    by_sample = placed(scores, visual, -torch.inf)
    if selector.per == "sample":
        vectors = None if vectors is None else placed(vectors, visual, 0.0)
        return selector.select(by_sample, visual, _budget(keep, visual), vectors), by_sample
    exists = torch.ones_like(scores, dtype=torch.bool)
    return placed(selector.select(scores, exists, _budget(keep, exists), vectors), visual, False), by_sample


def score_tokens(scorer: Scorer, seen: Observation, visual: Tensor) -> Tensor:
    """The scorer's scores, float [I, T'], once it is certain that every image's tokens are where they should be.

    Raises:
        PruningError: the samples' placeholders do not match the images. transformers would put one sample's features
        into another.
    """
    counts = visual.sum(1).tolist()
    wrong = [row for row, count in enumerate(counts) if count % seen.tokens]
    if wrong or sum(counts) != seen.images * seen.tokens:
        raise PruningError(
            f"{seen.images} images of {seen.tokens} visual tokens were read, but the samples have {counts} placeholders"
            + (f" (sample {wrong[0]} has no multiple of {seen.tokens})" if wrong else "")
            + ": features would reach the wrong sample. Give each sample as many image tokens as its images need."
        )
    with without_autocast(visual):
        return scorer.score(seen)


def visual_tokens(placeholders: Tensor) -> Tensor:
    """Placeholders in a prompt, bool [B, L] -> which visual tokens each sample has, bool [B, T]."""
    counts = placeholders.sum(1)
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def columns_kept(placeholders: Tensor, keep: Tensor) -> Tensor:
    """Columns of a prompt that stay, text always: bool [B, L], and bool [B, T] of its visual tokens -> bool [B, L]."""
    columns, own = ~placeholders, visual_tokens(placeholders)
    columns[placeholders] = keep[:, : own.shape[1]][own]  # these samples may be of a batch with more tokens
    return columns


def _budget(keep: int | float, visual: Tensor) -> Tensor:
    return torch.tensor([keep_count(keep, count) for count in visual.sum(1).tolist()], device=visual.device)


def placed(values: Tensor, visual: Tensor, fill: float | bool) -> Tensor:
    """Values of tokens in image order, [I, T', ...], put where their samples have them: [B, T, ...]."""
    found = values.new_full((*visual.shape, *values.shape[2:]), fill)
    found[visual] = values.flatten(0, 1)
    return found
