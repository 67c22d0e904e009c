"""FlashSloth: attention pooling of regions, and learned queries that read the image after the text (2412.04317)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.regions import Regions
from catp_lightning.methods.scorers.trained import Compressor, attend, common_weights, drawn
from catp_lightning.methods.weights import Weights


@dataclass(frozen=True)
class FlashSloth(Compressor):
    """Three quarters of the rows pool a region each; the others are learned queries that know the question.

    Spatial attention pooling weighs the tokens of region k, and of no other, by a learned score of each; learned query
    z_j reads the question's projected text rows q_r, and then all tokens:

        a_kt = softmax_{t in k}(weigh . gelu(see x_t + seen)),              h_k = sum_t a_kt x_t
        u_j  = z_j + sum_r softmax_r(query z_j . q_r / sqrt(width)) q_r
        a_jt = softmax_t(ask u_j . key x_t / sqrt(width)),                  h_j = u_j + sum_t a_jt value x_t

    The queries' rows are written after those of the regions, at the last tokens. The paper trains both together with
    the language model and puts the queries behind the text, where layers of the language model have read it before they
    see the image. Here the model is frozen, only the compressor is trained, and the queries read the question's word
    embeddings, before the language model.
    """

    shapes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Compressor.common,
        "see": ("width", "width"),
        "seen": ("width",),
        "weigh": ("width",),
        "queries": ("queries", "width"),
        "query": ("width", "width"),
        "ask": ("width", "width"),
        "key": ("width", "width"),
        "value": ("width", "width"),
    }

    def check(self, sizes: Mapping[str, int]) -> None:
        super().check(sizes)
        if self.tokens is not None and sizes["queries"] >= self.tokens:
            raise ValueError(f"the weights have {sizes['queries']} queries; that leaves none of {self.tokens} tokens.")

    def further(self, sizes: Mapping[str, int]) -> int:
        return sizes["queries"]

    def rows(
        self, weights: Weights, embeds: Tensor, text: Tensor, asked: Tensor, parts: Regions
    ) -> tuple[Tensor, Tensor]:
        scores = F.gelu(F.linear(embeds, weights["see"], weights["seen"])) @ weights["weigh"]
        number = torch.arange(parts.centre.shape[1], dtype=torch.int64, device=embeds.device)
        inside = (parts.region[:, None] == number[:, None]) & parts.own[:, None]
        pooling = scores[:, None].masked_fill(~inside, -torch.inf).softmax(-1)
        queries = weights["queries"].expand(len(embeds), -1, -1)
        queries = queries + attend(F.linear(queries, weights["query"]), text, text, asked)[0]
        keys, values = F.linear(embeds, weights["key"]), F.linear(embeds, weights["value"])
        read, reading = attend(F.linear(queries, weights["ask"]), keys, values, parts.own)
        return torch.cat([pooling, reading], 1), torch.cat([pooling @ embeds, queries + read], 1)

    @classmethod
    def sizes_for(cls, features: int, width: int, tokens: int) -> dict[str, int]:
        if tokens < 2:
            raise ValueError(f"tokens is {tokens}; a region and a query take at least 2.")
        return {"features": features, "width": width, "queries": max(1, tokens // 4)}

    @classmethod
    def initial(cls, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        width = sizes["width"]
        found = common_weights(sizes, generator)
        found |= {name: drawn((width, width), generator) for name in ("see", "query", "ask", "key", "value")}
        nothing = torch.zeros(width, dtype=torch.float32, device="cpu")
        queries = drawn((sizes["queries"], width), generator)
        return {**found, "seen": nothing, "weigh": nothing.clone(), "queries": queries}
