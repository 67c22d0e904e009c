"""Image tiles that text sees, and its attention to their rows, in models that read images by cross-attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from catp_lightning.errors import PruningError
from catp_lightning.prompt.attention import attention_map
from catp_lightning.prompt.kept import KeptSequence
from catp_lightning.prompt.prompt import last_rows
from catp_lightning.utils.on_cpu import of_known, on_cpu, with_copy

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

    def read(self, *more: Tensor) -> tuple["TextVisibility", list[Tensor]]:
        """Return the same visibility with copies on the CPU, and copies there of `more`, of integers or bool."""
        real, sees, tiles, *others = on_cpu(self.real, self.sees, self.tiles, *more)
        # Of new tensor objects: the caller's own may be changed later.
        parts = with_copy(self.real[:], real), with_copy(self.sees[:], sees), with_copy(self.tiles[:], tiles)
        return TextVisibility(*parts, self.mask), others

    @property
    def of_text(self) -> Tensor:
        """Tiles that each row sees, as `tiles` but False for padding: bool [R, L, N]."""
        return of_known(lambda tiles, real: tiles & real[..., None], self.tiles, self.real)

    def last_tiles(self) -> Tensor:
        """Return the tiles that the last row of text sees: bool [R, N]."""
        return of_known(_of_last_row, self.of_text, self.real)

    def mask_of(self, rows: "KeptSequence") -> Tensor:
        """Return the mask over the kept image rows, [R, 1, L, n]; text that sees an image does not see fillers."""
        mask = self.mask.gather(3, rows.order[:, None, None].expand(-1, 1, self.mask.shape[2], -1))
        fillers = ~rows.valid[:, None, None] & self.sees[:, None, :, None]
        return mask.masked_fill(fillers, torch.finfo(mask.dtype).min)


def _of_last_row(tiles: Tensor, real: Tensor) -> Tensor:
    return tiles.gather(1, last_rows(real)[..., None].expand(-1, 1, tiles.shape[2]))[:, 0]


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
    query, key = (_heads(module, *part).transpose(0, 1) for part in (("q", hidden), ("k", states)))
    key = key.repeat_interleave(module.num_key_value_groups, 0)[None]
    received = torch.zeros(key.shape[1:3], dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
    for some, seen in zip(query.split(TEXT_ROWS, 1), mask.split(TEXT_ROWS), strict=True):
        received += attention_map(some[None], key, seen[None, None], module.scaling)[0].sum(1)
    return received


def keys_and_values(module: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values that a cross-attention module makes of image rows: [M, T, D] -> [M, T, heads, width]."""
    return _heads(module, "k", states), _heads(module, "v", states)


def read_unmasked(module: Any, hidden: Tensor, read: tuple[Tensor, Tensor], evenly: Tensor) -> Tensor:
    """Return a cross-attention module's output for text rows that attend to all image rows: [M, n, D].

    Args:
        module: one of a model's `cross_attention`.
        hidden: float [M, n, D], text rows.
        read: what `keys_and_values` gives of the image rows, [M, T, heads, width] each.
        evenly: bool [M, n], text rows that weigh all image rows alike, as softmax does where everything is masked.
    """
    query = _heads(module, "q", hidden).masked_fill(evenly[..., None, None], 0).transpose(1, 2)
    key, value = (part.transpose(1, 2) for part in read)
    shared = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # query heads that share a key head become its rows
    found = scaled_dot_product_attention(shared, key, value, scale=module.scaling)
    return module.o_proj(found.reshape(query.shape).transpose(1, 2).flatten(2))


def _heads(module: Any, name: str, rows: Tensor) -> Tensor:
    """Return queries, keys or values of rows as the module itself makes them: [..., D] -> [..., heads, width].

    Args:
        module: a cross-attention module.
        name: "q", "k" or "v".
        rows: float [..., D].
    """
    heads = getattr(module, f"{name}_proj")(rows).unflatten(-1, (-1, module.head_dim))
    norm = getattr(module, f"{name}_norm", None)
    return heads if norm is None else norm(heads)
