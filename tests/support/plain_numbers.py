"""Random numbers as plain lists, for slow versions of methods."""

import math
from typing import Any

import torch
from torch import Tensor

from catp_lightning.methods.observation import Observation, Signal

Rows = list[list[float]]


def numbers(shape: tuple[int, ...], seed: int, most: int = 3) -> Tensor:
    """Small whole numbers, so that there are ties: float64."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def some(rows: int, tokens: int, seed: int) -> Tensor:
    """Which tokens each row has: bool [rows, tokens], scattered, at least one."""
    valid = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed)) < 0.8
    valid[:, 0] |= ~valid.any(1)
    return valid


def best_first(scores: list[float], places: list[int]) -> list[int]:
    return sorted(places, key=lambda place: (math.isnan(scores[place]), -scores[place], place))


def attended(seed: int, layers: int = 1) -> Observation:
    """Three samples of up to seven tokens and up to five text rows, in two heads; some text rows are alike."""
    valid, text = some(3, 7, seed), some(3, 5, seed + 1).sort(1, descending=True)[0]
    values: dict[Any, Tensor] = {
        Signal.IMAGE_EMBEDS: numbers((3, 7, 4), seed + 2),
        Signal.TEXT_EMBEDS: numbers((3, 5, 4), seed + 3, 1),
    }
    here = torch.ones(3, 7, dtype=torch.bool)
    here[1, 5:] = False  # the second sample has fewer
    valid &= here
    values[Signal.IMAGE_EMBEDS] = values[Signal.IMAGE_EMBEDS] * here[..., None]
    values[Signal.TEXT_EMBEDS] = values[Signal.TEXT_EMBEDS] * text[..., None]
    for layer in range(layers):
        paid = numbers((3, 2, 5, 7), seed + 4 + layer).abs() / 8
        values[Signal.TEXT_TO_IMAGE_ATTENTION, layer] = (paid * text[:, None, :, None] * here[:, None, None]).float()
    return Observation(valid, {Signal.TEXT_TO_IMAGE_ATTENTION: layers}, values, text=text)
