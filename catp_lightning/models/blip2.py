"""BLIP-2 and its relatives: the language model reads query tokens of a Q-Former."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
    PreTrainedModel,
)

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Observation, Signal, Values
from catp_lightning.models.base import AttentionSite, Family, OutputSite, Runs
from catp_lightning.models.images import Part
from catp_lightning.prompt.attention import attention_map, attention_received
from catp_lightning.prompt.prompt import DecoderPrompt, Prompt
from catp_lightning.utils.hashing import fingerprint
from catp_lightning.utils.on_cpu import on_cpu, on_device

LANGUAGE_MODELS = {"opt": "decoder", "llama": "decoder", "t5": "encoder"}


def _received_over_heads(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return attention_received(query, key, mask, scaling).sum(1)


class Blip2(Family):
    """BLIP-2. Its Q-Former does not see the question: scores depend on the image alone."""

    name = "blip-2"
    classes = ("Blip2ForConditionalGeneration",)
    model: Blip2ForConditionalGeneration

    @classmethod
    def handles(cls, model: PreTrainedModel) -> bool:
        return isinstance(model, Blip2ForConditionalGeneration)

    def check(self) -> None:
        kind = self.model.language_model.config.model_type
        if kind not in LANGUAGE_MODELS:
            raise PruningError(
                f"{type(self.model).__name__} with {type(self.model.language_model).__name__} cannot be pruned: only "
                f"{', '.join(sorted(LANGUAGE_MODELS))} were shown to be exact. Use a checkpoint with one of those, "
                "Salesforce/blip2-opt-2.7b or Salesforce/blip2-flan-t5-xl for example."
            )
        self.reads = LANGUAGE_MODELS[kind]  # type: ignore[assignment]
        if self._placeholder() is None:
            raise PruningError(
                f"This {type(self.model).__name__} has no image token in its config (image_token_index is None), so "
                "its visual tokens cannot be found. "
                "Load a checkpoint saved by transformers 4.46 or later, or set model.config.image_token_index."
            )

    def shape(self) -> Mapping[str, int]:
        return {
            "visual_tokens": self.tokens_per_image,
            "cross_attention_layers": len(self._cross_attention()),
            "heads": self.model.qformer.config.num_attention_heads,
        }

    def _placeholder(self) -> int | None:
        return self.model.config.image_token_id

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return (int(self._placeholder() or 0),)

    @property
    def tokens_per_image(self) -> int:
        """Number of query tokens of each image or frame."""
        return int(self.model.config.num_query_tokens)

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.vision_model.embeddings,)  # the hash is of what `vision_model` itself is given

    def heads(self, signal: Signal) -> int:
        config = self.model.qformer.config if signal in self.layers() else self.decoder_config
        return int(config.num_attention_heads)

    @property
    def decoder(self) -> nn.Module:
        text = self.model.language_model
        return text.get_encoder() if self.reads == "encoder" else text.get_decoder()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model.language_model

    def positions(self, mask: Tensor, past: int = 0) -> Tensor:
        if self.model.language_model.config.model_type == "opt":
            return (mask.cumsum(1) * mask - 1)[:, past:].long()  # as OPTDecoder.forward
        return super().positions(mask, past)

    def check_images(self, visual: Tensor, given: Mapping[str, Any]) -> None:
        """Raise PruningError if the placeholders of the prompts are not as many as the query tokens of the images.

        The model fills placeholders in turn with what there is, and does not count them.
        """
        pixels = given.get("pixel_values")
        if pixels is None:
            return
        images = len(pixels) * (pixels.shape[1] if pixels.dim() == 5 else 1)
        counts = on_cpu(visual)[0].sum(1)
        if bool((counts % self.tokens_per_image).any()) or int(counts.sum()) != images * self.tokens_per_image:
            raise PruningError(
                f"The model was given {images} images or frames of {self.tokens_per_image} visual tokens each, and its "
                f"prompts have {counts.tolist()} placeholders (id {self.placeholder_ids[0]}): a sample would be "
                "answered without its image, or with another's. Make ids with the model's processor; one saved before "
                f"transformers 4.46 leaves them out, until processor.num_query_tokens = {self.tokens_per_image} is set."
            )

    def layers(self) -> Mapping[Signal, int]:
        return {
            Signal.CROSS_ATTENTION: len(self._cross_attention()),
            Signal.SELF_ATTENTION: len(self.model.qformer.encoder.layer),
        }

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({Signal.VISION_ATTENTION_RECEIVED, Signal.IMAGE_FEATURES, Signal.IMAGE_HASH}) | self.at_entry

    @property
    def at_entry(self) -> frozenset[Signal]:
        return frozenset({Signal.IMAGE_EMBEDS, Signal.TEXT_EMBEDS, Signal.QUESTION})

    def attention_sites(self, signal: Signal, layer: int) -> Sequence[AttentionSite]:
        qformer, vision = self.model.qformer, self.model.vision_model
        if signal is Signal.CROSS_ATTENTION:
            return [AttentionSite(qformer, self._cross_attention()[layer], attention_map)]
        if signal is Signal.SELF_ATTENTION:
            return [AttentionSite(qformer, qformer.encoder.layer[layer].attention.attention, self._received_by_queries)]
        return [AttentionSite(vision, vision.encoder.layers[-1].self_attn, _received_over_heads)]

    def _received_by_queries(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Return the attention that each query token receives from all query tokens, [B, H, T].

        InstructBLIP's Q-Former has the words of the question behind its query tokens; they are left out. Arguments are
        those of an `attention.Reduction`.
        """
        tokens = self.tokens_per_image
        mask = mask if mask is None or mask.dim() == 2 or mask.shape[2] == 1 else mask[:, :, :tokens]
        return attention_received(query[:, :, :tokens], key, mask, scaling)[:, :, :tokens]

    def output_site(self, signal: Signal) -> OutputSite:
        if signal is Signal.IMAGE_FEATURES:
            return OutputSite(self.model.qformer, lambda args, kwargs, output: output[0][:, : self.tokens_per_image])
        return OutputSite(self.model.vision_model, _pixels)

    def observation(self, values: Runs, wanted: frozenset[Signal], prompt: Prompt) -> Observation:
        found: Values = {key: runs[-1] for key, runs in values.items()}
        if not wanted and found:
            return Observation.of_equal(len(next(iter(found.values()))), self.tokens_per_image, self.layers(), found)
        prompt = cast(DecoderPrompt, prompt)
        (visual,) = on_cpu(prompt.visual)
        sample = on_device(visual.nonzero()[:: self.tokens_per_image, 0], prompt.visual.device)  # of each image
        text = None
        if Signal.IMAGE_EMBEDS in wanted:
            read = prompt.of_tokens(prompt.embeds[:: prompt.rows_per_sample]).detach()
            found[Signal.IMAGE_EMBEDS] = read.unflatten(0, (-1, self.tokens_per_image))
        if Signal.QUESTION in wanted:
            found[Signal.QUESTION] = prompt.question()[sample]
        if Signal.TEXT_EMBEDS in wanted:
            found[Signal.TEXT_EMBEDS], text = (part[sample] for part in prompt.text())
        images = next((len(value) for value in found.values()), len(sample))
        seen = Observation.of_equal(images, self.tokens_per_image, self.layers(), found)
        return replace(seen, text=text)

    def parts(self, prompt: Prompt) -> list[list[Part]]:
        config: Any = self.model.config.vision_config
        side, pixels = config.image_size // config.patch_size, prompt.arguments.get("pixel_values")
        if pixels is None:
            images = int(on_cpu(prompt.tokens)[0].sum()) // self.tokens_per_image
            return [[Part(side, side, None, (0, 0))]] * images
        return [[Part(side, side, picture, (0, 0))] for picture in pixels.flatten(0, -4)]

    def _cross_attention(self) -> list[nn.Module]:
        return [
            layer.crossattention.attention for layer in self.model.qformer.encoder.layer if layer.has_cross_attention
        ]


class InstructBlip(Blip2):
    """InstructBLIP. Its Q-Former reads the question too: scores depend on it."""

    name = "instructblip"
    classes = ("InstructBlipForConditionalGeneration",)

    @classmethod
    def handles(cls, model: PreTrainedModel) -> bool:
        return isinstance(model, InstructBlipForConditionalGeneration)


class InstructBlipVideo(Blip2):
    """InstructBLIP for video: the language model reads query tokens of each frame, one frame after the other."""

    name = "instructblip-video"
    classes = ("InstructBlipVideoForConditionalGeneration",)

    @classmethod
    def handles(cls, model: PreTrainedModel) -> bool:
        return isinstance(model, InstructBlipVideoForConditionalGeneration)

    def _placeholder(self) -> int | None:
        return self.model.config.video_token_id


def _pixels(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    with torch.no_grad():
        return fingerprint(pixels)
