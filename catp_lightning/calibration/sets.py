"""Which set each of many candidates keeps: what candidates share is computed once."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from catp_lightning.choosing import images_to_samples, score_tokens
from catp_lightning.counts import keep_count
from catp_lightning.observation import Observation
from catp_lightning.policy import PruningPolicy
from catp_lightning.scorers import Scorer
from catp_lightning.selectors import Selector
from catp_lightning.selectors.dpp import DPP, exact_similarity, greedy_ranks

KERNELS = 2**20  # elements of the kernels that are held at a time, 8 MiB


Method = tuple[Scorer, Selector]


def methods(rules: Sequence[PruningPolicy]) -> list[Method]:
    """What policies are made of; checking their arguments takes longer than a small batch does."""
    return [(rule.build_scorer(), rule.build_selector()) for rule in rules]


def token_ranks(rules: Sequence[PruningPolicy], seen: Observation, visual: Tensor, most: int) -> Tensor:
    """`method_ranks` of policies, whatever their budget."""
    return method_ranks(methods(rules), seen, visual, most)


def method_ranks(rules: Sequence[Method], seen: Observation, visual: Tensor, most: int) -> Tensor:
    """The order in which each rule's tokens join its set, so that all budgets are served at once.

    Args:
        rules: scorers and selectors.
        seen: the signals of I images that the rules read.
        visual: bool [B, T], which visual tokens each sample has.
        most: how many tokens of an image are to be ranked.

    Returns:
        int64 [C, B, T]: 0 for the first of an image's tokens to join; `most` or more for one that stays out or is none.
        Tokens that always stay are none of these.
    """
    scores: dict[Scorer, Tensor] = {}
    similarities: dict[Selector, Tensor] = {}
    ranks: list[Tensor] = []
    kernels: dict[int, Tensor] = {}
    droppable = seen.droppable
    for number, (scorer, selector) in enumerate(rules):
        if scorer not in scores:
            scores[scorer] = score_tokens(scorer, seen, visual)
        if not isinstance(selector, DPP):
            ranks.append(selector.ranks(scores[scorer], droppable, most, selector.vectors(seen)))
            continue
        kind = replace(selector, relevance=0.0)
        if kind not in similarities:
            similarities[kind] = exact_similarity(selector.vectors(seen))
        kernels[number] = selector.kernel(scores[scorer], droppable, similarities[kind])
        ranks.append(droppable)  # its place: kernels of many candidates are solved together
        if len(kernels) * kernels[number].numel() >= KERNELS:
            _solve(kernels, ranks, droppable, most)
    _solve(kernels, ranks, droppable, most)
    return images_to_samples(torch.stack(ranks, 2), seen.valid, visual, most).permute(2, 0, 1)


def _solve(kernels: dict[int, Tensor], ranks: list[Tensor], droppable: Tensor, most: int) -> None:
    """Replace the places of these candidates in `ranks` by their solutions."""
    if not kernels:
        return
    together = torch.cat(list(kernels.values()))
    solved = greedy_ranks(together, droppable.repeat(len(kernels), 1), most).chunk(len(kernels))
    for number, found in zip(kernels, solved, strict=True):
        ranks[number] = found
    kernels.clear()


def is_nested(method: Method) -> bool:
    """Whether one ranking of each image's tokens says what a method keeps at every budget."""
    selector = method[1]
    return selector.nested and selector.per == "image"


def limits(keep: int | float, seen: Observation, visual: Tensor) -> Tensor:
    """How many tokens the image of each visual token keeps: int64 [B, T], 0 where there is none."""
    counts = [keep_count(keep, count) for count in seen.droppable.sum(1).tolist()]
    own = torch.tensor(counts, device=visual.device, dtype=torch.int64)[:, None].expand(seen.valid.shape)
    return images_to_samples(own, seen.valid, visual, 0)


def protected_tokens(seen: Observation, visual: Tensor) -> Tensor:
    """Visual tokens that stay whatever the budget: bool [B, T]."""
    return images_to_samples(seen.valid & ~seen.droppable, seen.valid, visual, False)


def pair_rows(slots: Tensor) -> Tensor:
    """Which pairs of slots, each with itself included, were kept together: float [..., T] -> [..., T (T + 1) / 2]."""
    first, second = torch.triu_indices(slots.shape[-1], slots.shape[-1])
    return slots[..., first] * slots[..., second]
