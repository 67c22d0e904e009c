"""Slow versions of selectors, written with loops from their definitions."""

import math

import numpy as np
import torch
from torch import Tensor


def cosine(a: list[float], b: list[float]) -> float:
    """To five decimals: what is equal but for rounding is a tie."""
    if a == b:
        return 1.0
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return round(sum(x * y for x, y in zip(a, b, strict=True)) / lengths, 5) if lengths else 0.0


def by_score(scores: list[float]) -> list[int]:
    """Highest first; of equals the lowest index, what is not a number last."""
    return sorted(range(len(scores)), key=lambda t: (math.isnan(scores[t]), -scores[t], t))


def slow_prune_similar(scores: list[float], features: list[list[float]], count: int, share: float) -> set[int]:
    order = by_score(scores)
    top = math.floor(count * share)
    if share > 0 and top == 0:
        top = 1
    left = order[top:]
    if top == count:
        left = []
    while top + len(left) > count:
        first: list[int] = []
        second: list[int] = []
        for number, token in enumerate(left):
            (second if number % 2 else first).append(token)
        drop = min(8, top + len(left) - count, len(left) // 2)
        nearest = {a: max(cosine(features[a], features[b]) for b in second) for a in first}
        least_similar_first = sorted(first, key=lambda a: (nearest[a], first.index(a)))
        left = least_similar_first[: len(first) - drop][::-1] + second
    return set(order[:top] + left)


def slow_context_merge(scores: list[float], keys: list[list[float]], count: int, share: float) -> dict[int, int]:
    """Who carries each token."""
    context = min(count - 1, math.floor(count * share + 0.5))
    dominant = by_score(scores)[: count - context]
    rest = [t for t in range(len(scores)) if t not in dominant]
    carrier = {t: t for t in dominant}
    if context == 0:
        return carrier | dict.fromkeys(rest, -1)
    step = max(1, len(rest) // context)
    targets = [rest[number * step] for number in range(context)]
    for token in rest:
        best = targets[0]
        for target in targets:
            if cosine(keys[token], keys[target]) > cosine(keys[token], keys[best]):
                best = target
        carrier[token] = token if token in targets else best
    return carrier


def slow_max_min(features: list[list[float]], count: int) -> list[int]:
    apart = [[1 - cosine(a, b) for b in features] for a in features]
    tokens = range(len(features))
    chosen: list[int] = []
    while len(chosen) < count:
        best, farthest = -1, -1.0
        for token in tokens:
            others = [apart[token][u] for u in (chosen or tokens) if u != token]
            if token not in chosen and (min(others) if others else math.inf) > farthest:
                best, farthest = token, min(others) if others else math.inf
        chosen.append(best)
    return chosen


def slow_conditional_dpp(relevance: list[float], features: list[list[float]], count: int) -> list[int]:
    """Adds the token with which the determinant of the chosen block is largest."""
    size = len(relevance)
    unit = np.array(features) / np.linalg.norm(features, axis=1, keepdims=True)
    kernel = np.outer(relevance, relevance) * (unit @ unit.T)
    kernel += 1e-4 * np.eye(size)
    chosen: list[int] = []
    for _ in range(count):
        best, largest = -1, -math.inf
        for token in range(size):
            block = kernel[np.ix_([*chosen, token], [*chosen, token])]
            if token not in chosen and np.linalg.det(block) > largest:
                best, largest = token, float(np.linalg.det(block))
        chosen.append(best)
    return chosen


def drawn(seed: int, tokens: int, tie: bool) -> tuple[list[float], list[list[float]]]:
    """Scores and vectors; with ties scores are few numbers and some vectors are the same."""
    rng = np.random.default_rng(seed)
    if not tie:
        return rng.normal(size=tokens).tolist(), rng.normal(size=(tokens, 5)).tolist()
    vectors = rng.normal(size=(max(2, tokens // 2), 5))[rng.integers(0, max(2, tokens // 2), tokens)]
    return rng.integers(0, 3, tokens).astype(float).tolist(), vectors.tolist()


def batch(rows: list[tuple[list[float], list[list[float]]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of different lengths; what is beyond a row's own looks better than anything in it."""
    size = max(len(scores) for scores, _ in rows)
    scores = torch.full((len(rows), size), 99.0, dtype=torch.float64)
    vectors, visual = torch.full((len(rows), size, 5), 7.0, dtype=torch.float64), torch.zeros(len(rows), size) > 0
    for row, (own, features) in enumerate(rows):
        scores[row, : len(own)], visual[row, : len(own)] = torch.tensor(own, dtype=torch.float64), True
        vectors[row, : len(own)] = torch.tensor(features, dtype=torch.float64)
    return scores, vectors, visual


def slow_pool(side: int, count: int) -> list[int]:
    """Who carries each token of a square image."""
    shapes = [(h, w) for h in range(1, side + 1) for w in range(h, side + 1) if h * w <= count]
    most = max(h * w for h, w in shapes)
    high, wide = min((s for s in shapes if s[0] * s[1] == most), key=lambda s: s[1] - s[0])
    cells: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for line in range(side):
        for column in range(side):
            cell = (math.floor(line * high / side), math.floor(column * wide / side))
            cells.setdefault(cell, []).append((line, column))
    assert len(cells) == most
    carrier = [-1] * side**2
    for tokens in cells.values():
        middle = [sum(place[axis] for place in tokens) / len(tokens) for axis in (0, 1)]
        best = min(tokens, key=lambda t: ((t[0] - middle[0]) ** 2 + (t[1] - middle[1]) ** 2, t))
        for line, column in tokens:
            carrier[line * side + column] = best[0] * side + best[1]
    return carrier
