"""Vision towers whose attention is observed block by block, and what their patches' values are for tokens."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from transformers import PreTrainedModel

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Signal
from catp_lightning.models.base import AttentionSite, Runs
from catp_lightning.models.images import pictures
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.attention import attention_map, attention_received
from catp_lightning.prompt.prompt import DecoderPrompt

WITH_CLASS = {"clip_vision_model"}
WITHOUT_CLASS = {"siglip_vision_model"}
PACKED = {"pixtral"}


@dataclass(frozen=True)
class Tower:
    """Vision tower of a model, as far as it leads to the features that are projected.

    Attributes:
        model: the tower, whose config names its attention implementation.
        blocks: attention module of each of its blocks.
        whole: those of `blocks` in which every patch attends to all patches of its image; None: all of them.
        has_class: True if the first row of each picture is [CLS].
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    whole: Sequence[nn.Module] | None = None
    has_class: bool = False

    def layers(self, signal: Signal) -> Sequence[nn.Module]:
        """Return the attention modules that show a signal, `Signal.VISION_ATTENTION` or `Signal.VISION_KEYS`."""
        return self.blocks if signal is Signal.VISION_KEYS or self.whole is None else self.whole


class Towered(Placeholder):
    """Model that shows attention and keys of its vision tower.

    `Signal.VISION_ATTENTION` is the attention that [CLS] pays to a patch, or in towers that have no [CLS] what a patch
    receives from the patches of its image, on average. `Signal.VISION_KEYS` is the key of a patch as it is attended to,
    rotated where the tower rotates it. Where several patches make a token, both are means over its patches: the token
    is computed of all of them alike, so it gets the attention that one of its patches gets on average, whatever their
    number, and two tokens are as similar as their patches are on average.
    """

    @property
    def towers(self) -> Sequence[Tower]:
        """Towers that are observed, all with the same blocks; empty if what their attention means is not known."""
        return ()

    @abstractmethod
    def of_patches(self, kind: str, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        """Return the values of each image's, or frame's, tokens, in the order of their features: [D, tokens].

        Args:
            kind: "image" or "video".
            value: [P, D, N], values of all patches in one forward of the tower; P is the number of pictures, or 1 where
                the patches of all pictures lie in one row.
            prompt: the prompts that the images belong to.
        """

    def heads(self, signal: Signal) -> int:
        if signal not in self.layers():
            return super().heads(signal)
        config: Any = self.towers[0].model.config
        return int(config.num_heads if hasattr(config, "num_heads") else config.num_attention_heads)

    def layers(self) -> Mapping[Signal, int]:
        found = {
            signal: len(tower.layers(signal))
            for tower in self.towers[:1]
            for signal in (Signal.VISION_ATTENTION, Signal.VISION_KEYS)
        }
        return {signal: count for signal, count in found.items() if count}

    def attention_sites(self, signal: Signal, layer: int) -> list[AttentionSite]:
        reductions = {
            (Signal.VISION_ATTENTION, True): from_class,
            (Signal.VISION_ATTENTION, False): received,
            (Signal.VISION_KEYS, True): keys_without_class,
            (Signal.VISION_KEYS, False): keys,
        }
        return [
            AttentionSite(tower.model, tower.layers(signal)[layer], reductions[signal, tower.has_class])
            for tower in self.towers
        ]

    def on_tokens(self, values: Runs, prompt: DecoderPrompt) -> dict[Any, dict[int, list[Tensor]]]:
        """Return the values of each image's tokens by the images' placeholder.

        A model reads images first and then videos, if it is given both: each has a run of its own.
        """
        kinds = {kind: token for kind, token in self.kinds(prompt.arguments).items() if values}
        if any(len(runs) < len(kinds) for runs in values.values()):
            raise PruningError(
                f"The vision tower of {type(self.model).__name__} did not run for all images and videos of this call, "
                "so their tokens cannot be scored. Pass pixel_values and pixel_values_videos, not features."
            )
        found: dict[Any, dict[int, list[Tensor]]] = {key: {token: [] for token in kinds.values()} for key in values}
        for key, runs in values.items():
            for (kind, token), value in zip(kinds.items(), runs[-len(kinds) :], strict=True):
                found[key][token] += self.of_patches(kind, value, prompt)  # GLM-V has one placeholder for both
        return found

    def kinds(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Return "image" and "video", as far as a call brings pixels of them, each with its placeholder id."""
        names = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
        return {
            kind: int(getattr(self.model.config, f"{kind}_token_id"))
            for kind, own in names.items()
            if any(arguments.get(name) is not None for name in own)
        }


def known_tower(model: Any, layers: int | Sequence[int] = -1) -> Tower | None:
    """Return a tower of CLIP, SigLIP or Pixtral up to the block whose output is projected; None if it is another.

    Args:
        model: the tower.
        layers: which of its hidden states are projected, 0 for what enters the first block; of several the deepest
            counts.
    """
    kind = model.config.model_type
    if kind not in WITH_CLASS | WITHOUT_CLASS | PACKED:
        return None
    depth = model.config.num_hidden_layers
    read = max(
        layer if layer >= 0 else depth + layer + 1 for layer in ([layers] if isinstance(layers, int) else layers)
    )
    if kind in PACKED:
        blocks = [block.attention for block in model.transformer.layers[:read]]
    else:
        blocks = [block.self_attn for block in getattr(model, "vision_model", model).encoder.layers[:read]]
    return Tower(model, blocks, has_class=kind in WITH_CLASS)


def from_class(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the attention that [CLS], the first row, pays to each patch: [B, H, N]."""
    return attention_map(query[:, :, :1], key, mask, scaling)[:, :, 0, 1:]


def received(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the attention that each patch receives, on average over the patches that may attend to it: [B, H, N].

    Those are the patches of its own image; padding neither counts nor receives anything.
    """
    if mask is None:
        return attention_received(query, key, mask, scaling) / query.shape[2]
    if mask.dim() == 2:  # the mask of flash attention: which keys are real
        sees = mask[:, None, None].bool()
    else:
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    sees = sees.expand(-1, -1, query.shape[2], -1)
    sees = sees & sees.diagonal(dim1=-2, dim2=-1)[..., None]  # padding does not see itself
    return attention_received(query, key, mask, scaling, sees) / sees.sum(2).clamp(min=1)


def keys(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the key vectors of the patches, mean over heads, in float32 at least: [B, D, N]."""
    return key.to(torch.promote_types(key.dtype, torch.float32)).mean(1).transpose(1, 2)


def keys_without_class(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the key vectors of the patches where the first row is [CLS], which is left out: [B, D, N].

    Mean over heads, in float32 at least.
    """
    return keys(query, key, mask, scaling)[..., 1:]


def in_squares(value: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    """Return means over squares of patches, line by line: [D, rows * columns] -> [D, squares].

    Args:
        value: values of patches, line by line.
        shape: rows and columns of patches; what is left over at the ends of rows and columns is in no square.
        side: patches a side of a square.
    """
    return avg_pool2d(value.unflatten(1, shape), side).flatten(1)


def of_pictures(value: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return values of the pictures that a call brings, [pictures, ...], of those that the tower read, beams included.

    Args:
        value: of each picture that the tower read, [P, ...].
        arguments: arguments of the model's call.
    """
    pixels = pictures(arguments)
    return value if pixels is None else of_first_beams(value, [1] * len(pixels), 0)


def of_sized_images(model: Any, value: Tensor, sizes: Any) -> list[Tensor]:
    """Return the values of each image's tokens where the patches of all images lie in one row: of each [D, tokens].

    Args:
        model: a model with Pixtral's tower.
        value: [D, N], the patches of all images.
        sizes: heights and widths of the images in pixels, [I, 2], a tensor or lists.
    """
    patch, side = model.config.vision_config.patch_size, getattr(model.config, "spatial_merge_size", 1)
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    shapes = [(height // patch, width // patch) for height, width in sizes]
    areas = [rows * columns for rows, columns in shapes]
    images = of_first_beams(value, areas, 1).split(areas, 1)
    return [in_squares(own, shape, side) for own, shape in zip(images, shapes, strict=True)]


def of_first_beams(value: Tensor, counts: Sequence[int], dim: int) -> Tensor:
    """Return what is shown of the first beam of each sample or image.

    Older versions of `generate` expand pixels for beams before they are read: repetitions lie side by side.

    Args:
        value: values of all beams.
        counts: size along `dim` of each sample, or image, that is repeated as a whole.
        dim: the dimension along which values are repeated.
    """
    beams = value.shape[dim] // sum(counts)
    parts = value.split([count for count in counts for _ in range(beams)], dim)
    return torch.cat(parts[::beams], dim)
