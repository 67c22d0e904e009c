"""Compute the set of tokens that each of many candidates keeps; what candidates share is computed once."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.method import Method, score_tokens
from catp_lightning.methods.observation import Observation
from catp_lightning.methods.routing import Routed
from catp_lightning.methods.scorers import Scorer
from catp_lightning.methods.selection import images_to_samples
from catp_lightning.methods.selectors import Selector
from catp_lightning.methods.selectors.determinant import greedy_ranks
from catp_lightning.methods.selectors.dpp import DPP
from catp_lightning.methods.selectors.similarity import exact_similarity

KERNELS = 2**20  # elements of the DPP kernels that are held at a time, 8 MiB


def token_ranks(rules: Sequence[Method], seen: Observation, visual: Tensor, max_tokens: int) -> Tensor:
    """Return the rank at which each token joins each rule's set, so that one result serves all budgets.

    Args:
        rules: C methods.
        seen: signals of I images that the rules read.
        visual: bool [B, T], visual tokens of each sample.
        max_tokens: number of tokens of an image that are to be ranked.

    Returns:
        int64 [C, B, T]: 0 for the first of an image's droppable tokens to join; `max_tokens` or more for a droppable
        token that stays out and for padding. The ranks of protected tokens, which always stay, mean nothing.
    """
    members = list(dict.fromkeys(rule for method in rules for rule in method.rules))
    of_members = _member_ranks(members, seen, visual, max_tokens)
    ranks = []
    for method in rules:
        own = torch.stack([of_members[members.index(rule)] for rule in method.rules])
        ranks.append(own[0] if not isinstance(method, Routed) else _of_routes(own, method.router.routes(seen)))
    return images_to_samples(torch.stack(ranks, 2), seen.valid, visual, max_tokens).permute(2, 0, 1)


def _of_routes(ranks: Tensor, routes: Tensor) -> Tensor:
    """Return the ranks of the rule that each image takes: int64 [R, I, T] and int64 [I] -> int64 [I, T]."""
    return ranks[routes, torch.arange(len(routes), dtype=torch.int64, device=routes.device)]


def _member_ranks(rules: Sequence[Method], seen: Observation, visual: Tensor, max_tokens: int) -> list[Tensor]:
    """Return the ranks of the tokens of each image, int64 [I, T], under each of several rules."""
    scores: dict[Scorer, Tensor] = {}
    similarities: dict[Selector, Tensor] = {}
    ranks: list[Tensor] = []
    kernels: dict[int, Tensor] = {}
    droppable = seen.droppable
    for number, rule in enumerate(rules):
        scorer, selector = rule.scorer, rule.selector
        if scorer not in scores:
            scores[scorer] = score_tokens(scorer, seen, visual)
        if not isinstance(selector, DPP):
            ranks.append(selector.ranks(scores[scorer], droppable, max_tokens, selector.vectors(seen)))
            continue
        kind = replace(selector, relevance=0.0)
        if kind not in similarities:
            similarities[kind] = exact_similarity(selector.vectors(seen))
        kernels[number] = selector.kernel(scores[scorer], droppable, similarities[kind])
        ranks.append(droppable)  # placeholder: kernels of many candidates are solved together
        if len(kernels) * kernels[number].numel() >= KERNELS:
            _solve(kernels, ranks, droppable, max_tokens)
    _solve(kernels, ranks, droppable, max_tokens)
    return ranks


def _solve(kernels: dict[int, Tensor], ranks: list[Tensor], droppable: Tensor, max_tokens: int) -> None:
    """Solve the DPP kernels together, put their solutions into the candidates' places in `ranks`, clear `kernels`."""
    if not kernels:
        return
    together = torch.cat(list(kernels.values()))
    solved = greedy_ranks(together, droppable.repeat(len(kernels), 1), max_tokens).chunk(len(kernels))
    for number, found in zip(kernels, solved, strict=True):
        ranks[number] = found
    kernels.clear()


def limits(keep: int | float, seen: Observation, visual: Tensor) -> Tensor:
    """Return how many droppable tokens the image of each visual token keeps: int64 [B, T]; 0 where no token is."""
    counts = [keep_count(keep, count) for count in seen.droppable.sum(1).tolist()]
    own = torch.tensor(counts, device=visual.device, dtype=torch.int64)[:, None].expand(seen.valid.shape)
    return images_to_samples(own, seen.valid, visual, 0)
