"""QueCC: visual tokens compressed by a convolution and cross-attention that know the question (2411.03312)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.regions import SIDE, Regions
from catp_lightning.methods.scorers.trained import HEADS, Compressor, attend, common_weights, drawn
from catp_lightning.methods.weights import Weights


@dataclass(frozen=True)
class QueCC(Compressor):
    """Rows of regions: a depthwise convolution, to which the question is added, asks; local cross-attention answers.

    With q the mean of the question's projected text rows, the mean over tokens t of cell c of region k as m_kc, and the
    distance between token t and the middle of region k as d_kt, in sides of a region,

        m_kc = mean_t (x_t + q),   g_k = sum_c kernel_c * m_kc   (a depthwise convolution of 3 x 3, with stride 3)
        a_kt = softmax_t(query g_k . key x_t / sqrt(width) - softplus(local) d_kt^2),   h_k = g_k + sum_t a_kt value x_t

    The paper trains the compressor together with the language model, which learns to read its rows; it takes the
    question from the model's own last layer, and a query sees its region alone. Here the model is frozen, only the
    compressor is trained, the question is its words' embeddings, and how fast attention falls off with distance is
    learned, for each head.
    """

    shapes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Compressor.common,
        "kernel": ("cells", "width"),
        "query": ("width", "width"),
        "key": ("width", "width"),
        "value": ("width", "width"),
        "local": ("heads",),
    }

    def check(self, sizes: Mapping[str, int]) -> None:
        super().check(sizes)
        if sizes["cells"] != SIDE**2 or sizes["heads"] != HEADS:
            raise ValueError(
                f"the weights are of {sizes['cells']} cells and {sizes['heads']} heads; there are {SIDE**2} and "
                f"{HEADS}."
            )

    def rows(
        self, weights: Weights, embeds: Tensor, text: Tensor, asked: Tensor, parts: Regions
    ) -> tuple[Tensor, Tensor]:
        question = (text * asked[..., None]).sum(1) / asked.sum(1, keepdim=True).clamp(min=1)
        grown = (embeds + question[:, None]) * parts.own[..., None]
        count, cells = parts.centre.shape[1], SIDE**2
        index = parts.region * cells + parts.cell
        total = grown.new_zeros(len(grown), count * cells, grown.shape[-1])
        total = total.scatter_add(1, index[..., None].expand_as(grown), grown)
        number = grown.new_zeros(total.shape[:2]).scatter_add(1, index, parts.own.to(grown.dtype))
        means = (total / number.clamp(min=1)[..., None]).unflatten(1, (count, cells))
        asking = torch.einsum("ikcw,cw->ikw", means, weights["kernel"])
        distance = (parts.place[:, None] - parts.centre[:, :, None]).square().sum(-1).to(grown.dtype)
        away = F.softplus(weights["local"])[None, :, None, None] * distance[:, None]
        keys, values = F.linear(embeds, weights["key"]), F.linear(embeds, weights["value"])
        read, paid = attend(F.linear(asking, weights["query"]), keys, values, parts.own, -away)
        return paid, asking + read

    @classmethod
    def initial(cls, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        square = (sizes["width"], sizes["width"])
        found = common_weights(sizes, generator)
        found |= {name: drawn(square, generator) for name in ("query", "key", "value")}
        kernel = torch.full((SIDE**2, sizes["width"]), 1 / SIDE**2, dtype=torch.float32, device="cpu")
        return {**found, "kernel": kernel, "local": torch.full((HEADS,), 2.0, dtype=torch.float32, device="cpu")}

    @classmethod
    def sizes_for(cls, features: int, width: int, tokens: int) -> dict[str, int]:
        return {"features": features, "width": width, "cells": SIDE**2, "heads": HEADS}
