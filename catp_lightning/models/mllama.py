"""Llama-3.2-Vision: some layers of the language model read image rows by cross-attention, from a cache of their own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration, PreTrainedModel

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Observation, Signal, Values
from catp_lightning.models.base import AttentionSite, Family, OutputSite, Reads, Runs
from catp_lightning.models.images import Part
from catp_lightning.prompt.attention import PREFIX
from catp_lightning.prompt.prompt import CrossAttended, Prompt
from catp_lightning.utils.hashing import fingerprint
from catp_lightning.utils.on_cpu import on_cpu, on_device

IMPLEMENTATIONS = ("eager", "sdpa")


class Mllama(Family):
    """Llama-3.2-Vision. Its visual tokens are image rows: [CLS] and patches of each tile, `tiles` tiles an image."""

    name = "mllama"
    classes = ("MllamaForConditionalGeneration",)
    reads: Reads = "cross-attention"
    model: MllamaForConditionalGeneration

    @classmethod
    def handles(cls, model: PreTrainedModel) -> bool:
        return isinstance(model, MllamaForConditionalGeneration)

    def check(self) -> None:
        if not self.cross_attention:
            raise PruningError(
                "This Llama-3.2-Vision has no cross-attention layers (text_config.cross_attention_layers is empty): "
                "its text never reads an image. Load a checkpoint that has them."
            )
        implementation = str(self.decoder.config._attn_implementation).removeprefix(PREFIX)
        if implementation not in IMPLEMENTATIONS:
            raise PruningError(
                f"Llama-3.2-Vision cannot be pruned under attn_implementation={implementation!r}, which does not take "
                f"its cross-attention mask. Load the model with {' or '.join(map(repr, IMPLEMENTATIONS))}."
            )

    def shape(self) -> Mapping[str, int]:
        return {
            "cross_attention_layers": len(self.cross_attention),
            "heads": self.decoder.config.num_attention_heads,
            "rows_per_tile": self.rows_per_tile,
            "tiles": self.tiles,
        }

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return (int(self.model.config.image_token_index),)

    @property
    def outer(self) -> nn.Module:
        return self.model.model

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def cross_attention(self) -> list[Any]:
        """Attention modules that read the image, in their order."""
        return [layer.cross_attn for layer in self.decoder.layers if hasattr(layer, "cross_attn")]

    @property
    def tiles(self) -> int:
        """Number of tiles of every image, those that only pad it included."""
        config: Any = self.model.config.vision_config
        return int(config.max_num_tiles)

    @property
    def rows_per_tile(self) -> int:
        """Number of rows of a tile: [CLS] and patches."""
        return int(self.model.model.vision_model.num_patches)

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_model,)

    def layers(self) -> Mapping[Signal, int]:
        return {Signal.CROSS_ATTENTION_TO_IMAGE: 1}

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({Signal.IMAGE_FEATURES, Signal.PATCH_POSITION, Signal.IMAGE_HASH, Signal.QUESTION})

    @property
    def at_entry(self) -> frozenset[Signal]:
        return self.signals | {Signal.CROSS_ATTENTION_TO_IMAGE}

    def attention_sites(self, signal: Signal, layer: int) -> Sequence[AttentionSite]:
        raise NotImplementedError(signal)  # all signals are read from the prompt

    def output_site(self, signal: Signal) -> OutputSite:
        raise NotImplementedError(signal)

    def observation(self, values: Runs, wanted: frozenset[Signal], prompt: Prompt) -> Observation:
        prompt = cast(CrossAttended, prompt)
        by_image = (-1, self.tiles * self.rows_per_tile)
        device, (tokens,) = prompt.tokens.device, on_cpu(prompt.tokens)
        valid = self._by_image(tokens)
        seen = valid.any(1).nonzero()[:, 0]  # an image that no text sees does not count
        images = on_device(seen, device)
        found: Values = {}
        if prompt.attention is not None:
            found[Signal.CROSS_ATTENTION_TO_IMAGE, 0] = (
                prompt.attention.unflatten(2, by_image).transpose(1, 2).flatten(0, 1)[images]
            )
        if Signal.IMAGE_FEATURES in wanted:
            found[Signal.IMAGE_FEATURES] = prompt.states.unflatten(1, by_image).flatten(0, 1)[images].detach()
        if Signal.QUESTION in wanted:
            sample = images // (len(valid) // len(tokens))
            found[Signal.QUESTION] = self._question(prompt)[sample]
        if Signal.IMAGE_HASH in wanted and prompt.arguments.get("pixel_values") is None:
            raise PruningError(
                "The call brought no pixel_values, so images cannot be told apart. Pass them, not precomputed "
                "cross_attention_states; or choose a scorer that draws nothing from the image (l2-norm, trimmed-llama)."
            )
        if Signal.IMAGE_HASH in wanted:
            found[Signal.IMAGE_HASH] = fingerprint(
                prompt.arguments["pixel_values"][:: prompt.rows_per_sample].flatten(0, 1)[images]
            )
        tile = torch.arange(self.tiles, dtype=torch.int64, device="cpu").repeat_interleave(self.rows_per_tile)
        if Signal.PATCH_POSITION in wanted:
            found[Signal.PATCH_POSITION] = on_device(self._places(tile).expand(len(seen), -1, -1), device)
        crops = on_device(tile.expand(len(seen), -1), device)
        return Observation(on_device(valid[seen], device), self.layers(), found, crops=crops)

    def _by_image(self, tokens: Tensor) -> Tensor:
        """Regroup what is of each sample's rows by image: [B, T] -> [I, tiles * rows of a tile]."""
        return tokens.unflatten(1, (-1, self.tiles * self.rows_per_tile)).flatten(0, 1)

    def parts(self, prompt: Prompt) -> list[list[Part]]:
        seen, side = self._by_image(on_cpu(prompt.tokens)[0]).any(1), math.isqrt(self.rows_per_tile - 1)
        given, step, config = prompt.arguments, prompt.rows_per_sample, cast(Any, self.model.config).vision_config
        pixels, ratios = given.get("pixel_values"), given.get("aspect_ratio_ids")
        shapes = [(1, self.tiles)] * len(seen)  # high and wide, in tiles
        if ratios is not None:  # 0 for an image that a sample does not have
            known = [(1, 1), *config.supported_aspect_ratios]
            shapes = [known[number] for number in ratios[::step].flatten().tolist()]
        pictures = [None] * len(seen) if pixels is None else pixels[::step].flatten(0, 1)
        return [
            [
                Part(side, side, None if tiles is None else tiles[tile], divmod(tile, wide))
                for tile in range(high * wide)
            ]
            for sees, tiles, (high, wide) in zip(seen.tolist(), pictures, shapes, strict=True)
            if sees
        ]

    def _question(self, prompt: CrossAttended) -> Tensor:
        """Return the mean of the embeddings of a prompt's text that sees an image: float [B, D], float32 at least."""
        ids, embeds = (prompt.text_arguments.get(name) for name in ("input_ids", "inputs_embeds"))
        embeds = self.model.get_input_embeddings()(ids) if embeds is None else embeds
        embeds = embeds[:: prompt.rows_per_sample].detach()
        rows = embeds.to(torch.promote_types(embeds.dtype, torch.float32)) * prompt.is_prompt[..., None]
        return rows.sum(1) / prompt.is_prompt.sum(1, keepdim=True).clamp(min=1)

    def _places(self, tile: Tensor) -> Tensor:
        """Return tile, row and column of each of an image's rows, int64 [T, 3]; row and column are -1 for a [CLS].

        Args:
            tile: int64 [T], the tile that each row is of.
        """
        patch = torch.arange(len(tile), dtype=torch.int64, device="cpu") % self.rows_per_tile - 1
        side = math.isqrt(self.rows_per_tile - 1)
        row = torch.where(patch < 0, -1, patch // side)
        return torch.stack([tile, row, torch.where(patch < 0, -1, patch % side)], 1)
