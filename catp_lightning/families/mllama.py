"""Llama-3.2-Vision: some layers of the language model read image rows by cross-attention, from a cache of their own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import MllamaForConditionalGeneration, PreTrainedModel

from catp_lightning.attention import PREFIX, attention_map
from catp_lightning.errors import PruningError
from catp_lightning.families.base import AttentionSite, Family, OutputSite, Reads
from catp_lightning.fingerprint import fingerprint
from catp_lightning.observation import Observation, Signal, Values

if TYPE_CHECKING:
    from catp_lightning.dropping.cross_attention import CrossAttended
    from catp_lightning.dropping.prompt import KeptSequence, Prompt

IMPLEMENTATIONS = ("eager", "sdpa")
TEXT_ROWS = 64  # text rows at a time: their attention to 6,404 image rows of one sample then takes 50 MB for 32 heads


@dataclass(frozen=True)
class TextVisibility:
    """Image tiles that the text of one call sees.

    R rows of the batch, L text rows, T image rows, N tiles of all images. All rows of a tile are seen alike.

    Attributes:
        real: bool [R, L], False for padding.
        sees: bool [R, L], True for rows, of text or padding, that see an image.
        tiles: bool [R, L, N], the tiles that each of these rows sees.
        mask: float [R, 1, L, T], the model's own: 0 or the lowest number; 0 throughout where a text row sees nothing.
    """

    real: Tensor
    sees: Tensor
    tiles: Tensor
    mask: Tensor

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], tile_rows: int) -> "TextVisibility":
        """Read the visibility from the arguments of the text model's call.

        Args:
            kwargs: the arguments, by name.
            tile_rows: number of image rows of a tile.

        Raises:
            PruningError: the caller gave no cross_attention_mask.
        """
        mask, sees = kwargs.get("cross_attention_mask"), kwargs.get("full_text_row_masked_out_mask")
        if mask is None or sees is None:
            raise PruningError(
                "Text came with an image, or a cache that holds one, but without cross_attention_mask: what it sees is "
                "not known. Pass the one the processor makes, extended by its last row at every decoding step."
            )
        sees, padding = sees[:, 0, :, 0].bool(), kwargs.get("attention_mask")
        real = torch.ones_like(sees)
        if isinstance(padding, Tensor) and padding.dim() == 2:
            real = padding[:, -sees.shape[1] :].to(sees.device).bool()
        return cls(real, sees, (mask[:, 0, :, ::tile_rows] == 0) & sees[..., None], mask)

    @property
    def of_text(self) -> Tensor:
        """Tiles that each row sees, as `tiles` but False for padding: bool [R, L, N]."""
        return self.tiles & self.real[..., None]

    def last_tiles(self) -> Tensor:
        """Return the tiles that the last row of text sees: bool [R, N]."""
        last = self.real.shape[1] - 1 - self.real.flip(1).long().argmax(1)
        return self.of_text[torch.arange(len(last), device=last.device), last]

    def mask_of(self, rows: "KeptSequence") -> Tensor:
        """Return the mask over the kept image rows, [R, 1, L, n]; text that sees an image does not see fillers."""
        mask = self.mask.gather(3, rows.order[:, None, None].expand(-1, 1, self.mask.shape[2], -1))
        fillers = ~rows.valid[:, None, None] & self.sees[:, None, :, None]
        return mask.masked_fill(fillers, torch.finfo(mask.dtype).min)


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
    def replayable(self) -> bool:
        return True

    @property
    def most_tokens(self) -> int:
        return self.tiles * self.rows_per_tile

    def layers(self) -> Mapping[Signal, int]:
        return {Signal.CROSS_ATTENTION_TO_IMAGE: 1}

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({Signal.IMAGE_FEATURES, Signal.PATCH_POSITION, Signal.IMAGE_HASH})

    @property
    def at_entry(self) -> frozenset[Signal]:
        return self.signals | {Signal.CROSS_ATTENTION_TO_IMAGE}

    def attention_site(self, signal: Signal, layer: int) -> AttentionSite:
        raise NotImplementedError(signal)  # all signals are read from the prompt

    def output_site(self, signal: Signal) -> OutputSite:
        raise NotImplementedError(signal)

    def observation(self, values: Values, wanted: frozenset[Signal], prompt: "Prompt") -> Observation:
        prompt = cast("CrossAttended", prompt)
        by_image = (-1, self.tiles * self.rows_per_tile)
        valid = prompt.tokens.unflatten(1, by_image).flatten(0, 1)
        images = valid.any(1)  # an image that no text sees does not count
        found: Values = {}
        if prompt.attention is not None:
            found[Signal.CROSS_ATTENTION_TO_IMAGE, 0] = (
                prompt.attention.unflatten(2, by_image).transpose(1, 2).flatten(0, 1)[images]
            )
        if Signal.IMAGE_FEATURES in wanted:
            found[Signal.IMAGE_FEATURES] = prompt.states.unflatten(1, by_image).flatten(0, 1)[images].detach()
        if Signal.IMAGE_HASH in wanted and prompt.arguments.get("pixel_values") is None:
            raise PruningError(
                "The call brought no pixel_values, so images cannot be told apart. Pass them, not precomputed "
                "cross_attention_states; or choose a scorer that draws nothing from the image (l2-norm, trimmed-llama)."
            )
        if Signal.IMAGE_HASH in wanted:
            found[Signal.IMAGE_HASH] = fingerprint(
                prompt.arguments["pixel_values"][:: prompt.beams].flatten(0, 1)[images]
            )
        tile = torch.arange(self.tiles, device=valid.device).repeat_interleave(self.rows_per_tile)
        if Signal.PATCH_POSITION in wanted:
            found[Signal.PATCH_POSITION] = self._places(tile).expand(int(images.sum()), -1, -1)
        return Observation(valid[images], self.layers(), found, crops=tile.expand(int(images.sum()), -1))

    def _places(self, tile: Tensor) -> Tensor:
        """Return tile, row and column of each of an image's rows, int64 [T, 3]; row and column are -1 for a [CLS].

        Args:
            tile: int64 [T], the tile that each row is of.
        """
        patch = torch.arange(len(tile), dtype=torch.int64, device=tile.device) % self.rows_per_tile - 1
        side = math.isqrt(self.rows_per_tile - 1)
        row = torch.where(patch < 0, -1, patch // side)
        return torch.stack([tile, row, torch.where(patch < 0, -1, patch % side)], 1)


def attention_of(module: Any, hidden: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Return the attention that each head of a cross-attention module pays to image rows, summed over text rows.

    Args:
        module: one of a model's `cross_attention`.
        hidden: float [n, D], text rows.
        states: float [T, D], image rows.
        mask: float [n, T], added to the logits.

    Returns:
        [H, T], float32 at least.
    """
    query, key = _heads(module, "q", hidden), _heads(module, "k", states)
    key = key.repeat_interleave(module.num_key_value_groups, 0)[None]
    received = torch.zeros(key.shape[1:3], dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
    for some, seen in zip(query.split(TEXT_ROWS, 1), mask.split(TEXT_ROWS), strict=True):
        received += attention_map(some[None], key, seen[None, None], module.scaling)[0].sum(1)
    return received


def read_unmasked(module: Any, hidden: Tensor, states: Tensor, evenly: Tensor) -> Tensor:
    """Return a cross-attention module's output for text rows that attend to all image rows: [n, D].

    Args:
        module: one of a model's `cross_attention`.
        hidden: float [n, D], text rows.
        states: float [T, D], image rows.
        evenly: bool [n], text rows that weigh all image rows alike, as softmax does where everything is masked.
    """
    query, key, value = _heads(module, "q", hidden), _heads(module, "k", states), _heads(module, "v", states)
    query = query.masked_fill(evenly[:, None], 0)
    shared = query.unflatten(0, (len(key), -1)).flatten(1, 2)  # query heads that share a key head become its rows
    read = scaled_dot_product_attention(shared[None], key[None], value[None], scale=module.scaling)[0]
    return module.o_proj(read.reshape(query.shape).transpose(0, 1).flatten(1))


def _heads(module: Any, name: str, rows: Tensor) -> Tensor:
    """Return queries, keys or values of rows as the module itself makes them: [n, D] -> [heads, n, width].

    Args:
        module: a cross-attention module.
        name: "q", "k" or "v".
        rows: float [n, D].
    """
    heads = getattr(module, f"{name}_proj")(rows).unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
    norm = getattr(module, f"{name}_norm", None)
    return heads if norm is None else norm(heads)
