"""BLIP-2: the language model reads Q-Former query tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, OPTForCausalLM, PreTrainedModel

from catp_lightning.attention import attention_map, attention_received
from catp_lightning.errors import PruningError
from catp_lightning.families.base import AttentionSite, Family, OutputSite
from catp_lightning.fingerprint import fingerprint
from catp_lightning.observation import Signal


def _received_over_heads(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return attention_received(query, key, mask, scaling).sum(1)


class Blip2(Family):
    """BLIP-2 with OPT. Its Q-Former does not see the question: scores depend on the image alone."""

    name = "blip-2"
    model: Blip2ForConditionalGeneration

    @classmethod
    def handles(cls, model: PreTrainedModel) -> bool:
        return isinstance(model, Blip2ForConditionalGeneration)

    def check(self) -> None:
        if not isinstance(self.model.language_model, OPTForCausalLM):
            raise PruningError(
                f"BLIP-2 with {type(self.model.language_model).__name__} cannot be pruned yet; OPT can. "
                "Use a checkpoint with OPT, Salesforce/blip2-opt-2.7b for example."
            )
        if self.model.config.image_token_id is None:
            raise PruningError(
                "This BLIP-2 has no image token in its config (image_token_index is None), so its visual tokens cannot "
                "be found. "
                "Load a checkpoint saved by transformers 4.46 or later, or set model.config.image_token_index."
            )

    def shape(self) -> Mapping[str, int]:
        return {
            "visual_tokens": self.tokens_per_image,
            "cross_attention_layers": len(self._cross_attention()),
            "heads": self.model.qformer.config.num_attention_heads,
        }

    @property
    def image_token_id(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def tokens_per_image(self) -> int:
        return int(self.model.config.num_query_tokens)

    @property
    def decoder(self) -> nn.Module:
        return self.model.language_model.model.decoder

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model.language_model

    def positions(self, mask: Tensor) -> Tensor:
        return (mask.cumsum(1) * mask - 1).long()  # as OPTDecoder.forward

    def layers(self) -> Mapping[Signal, int]:
        return {
            Signal.CROSS_ATTENTION: len(self._cross_attention()),
            Signal.SELF_ATTENTION: len(self.model.qformer.encoder.layer),
        }

    def attention_site(self, signal: Signal, layer: int) -> AttentionSite:
        qformer = self.model.qformer
        if signal is Signal.CROSS_ATTENTION:
            return AttentionSite(qformer, self._cross_attention()[layer], attention_map)
        if signal is Signal.SELF_ATTENTION:
            return AttentionSite(qformer, qformer.encoder.layer[layer].attention.attention, attention_received)
        vision = self.model.vision_model
        return AttentionSite(vision, vision.encoder.layers[-1].self_attn, _received_over_heads)

    def output_site(self, signal: Signal) -> OutputSite:
        if signal is Signal.OUTPUTS:
            return OutputSite(self.model.qformer, lambda args, kwargs, output: output[0])
        return OutputSite(self.model.vision_model, _pixels)

    def _cross_attention(self) -> list[nn.Module]:
        return [
            layer.crossattention.attention for layer in self.model.qformer.encoder.layer if layer.has_cross_attention
        ]


def _pixels(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    with torch.no_grad():
        return fingerprint(pixels)
