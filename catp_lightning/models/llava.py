"""LLaVA-1.5 and VipLLaVA: CLIP, SigLIP or Pixtral patches, projected one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Signal, Values
from catp_lightning.models.base import AttentionSite
from catp_lightning.models.images import Images, equal_images, pictures, sized_images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.attention import attention_map, attention_received
from catp_lightning.prompt.prompt import DecoderPrompt

WITH_CLASS = {"clip_vision_model"}
WITHOUT_CLASS = {"siglip_vision_model"}


class Llava(Placeholder):
    """LLaVA-1.5, VipLLaVA, and base class of their descendants.

    For images, the attention of the vision tower is observed in the layer whose output is projected and in those before
    it: what [CLS] pays to each patch, or what a patch receives if the tower has no [CLS]. For videos it is not.
    """

    types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")
    classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration", "VipLlavaForConditionalGeneration")

    @property
    def tokens_per_image(self) -> int | None:
        if self._sized:
            return None
        if not self._has_class and not self._full:  # the model leaves out the first patch as if it were a [CLS]
            return self._patches() - 1
        return self._patches() + int(self._has_class and self._full)

    @property
    def has_grid(self) -> bool:
        return self.tokens_per_image == self._patches()

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_tower,)

    def heads(self, signal: Signal) -> int:
        config = self.model.config.vision_config if signal in self.layers() else self.decoder_config
        return int(config.num_attention_heads)

    def layers(self) -> Mapping[Signal, int]:
        blocks = self._blocks()
        return {Signal.VISION_ATTENTION: blocks, Signal.VISION_KEYS: blocks} if blocks else {}

    def _blocks(self) -> int:
        """Return the number of tower blocks that lead to the features; 0 if their attention is not known by patch."""
        tower = getattr(self.model.model, "vision_tower", None)
        layer = getattr(self.model.config, "vision_feature_layer", None)
        if tower is None or not isinstance(layer, int):
            return 0
        if tower.config.model_type not in WITH_CLASS | WITHOUT_CLASS:
            return 0
        return layer if layer >= 0 else tower.config.num_hidden_layers + layer + 1

    def attention_site(self, signal: Signal, layer: int) -> AttentionSite:
        tower: Any = self.model.model.vision_tower
        encoder = getattr(tower, "vision_model", tower).encoder
        with_class = tower.config.model_type in WITH_CLASS
        attention = _from_class if with_class else _received
        keys = _keys_without_class if with_class else _keys
        reduction = keys if signal is Signal.VISION_KEYS else attention
        return AttentionSite(tower, encoder.layers[layer].self_attn, reduction)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        if pictures(prompt.arguments) is None:
            return {}
        if self._sized:
            return sized_images(self.model, prompt, counts)
        own = equal_images(self.model, prompt, counts)
        if self._has_class and self._full:  # [CLS] is one of the tokens
            own = {
                id_: [replace(one, protected=torch.arange(one.tokens, device=one.pixels.device) == 0) for one in all_]
                for id_, all_ in own.items()
            }
        if self.tokens_per_image == self._patches() - 1:  # the first patch is left out
            side = self._side()
            rest = torch.arange(1, side**2, dtype=torch.int64, device="cpu")
            own = {id_: [replace(one, shape=(side, side), patches=rest) for one in all_] for id_, all_ in own.items()}
        return own

    @property
    def _sized(self) -> bool:
        """True if images keep their own size, as the vision tower of Pixtral reads them."""
        return bool(self.model.config.vision_config.model_type == "pixtral")

    @property
    def _has_class(self) -> bool:
        return self.model.config.vision_config.model_type in WITH_CLASS

    @property
    def _full(self) -> bool:
        """True if the tower's first row, [CLS] where it has one, is a token too."""
        return getattr(self.model.config, "vision_feature_select_strategy", "default") == "full"

    def _side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def _patches(self) -> int:
        return self._side() ** 2

    def on_tokens(self, values: Values, prompt: DecoderPrompt) -> dict[Any, list[Tensor]]:
        if values and prompt.arguments.get("pixel_values_videos") is not None:
            raise PruningError(
                f"Attention in the vision tower of {type(self.model).__name__} is observed for images, not for videos. "
                "Give videos a batch of their own, and a policy whose scorer reads none (l2-norm, stride, random)."
            )
        return {key: self._of_images(value, prompt.arguments) for key, value in values.items()}

    def _of_images(self, value: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Regroup attention of pictures by the images that they are, in the order of the images' tokens.

        Args:
            value: [P, H, N]: P pictures, H heads, N patches.
            arguments: arguments of the model's call.

        Returns:
            Of each image [H, tokens].
        """
        return [picture[0] for picture in self._pictures(value, [1] * len(arguments["pixel_values"]))]

    def _pictures(self, value: Tensor, crops: Sequence[int]) -> list[Tensor]:
        """Return the values of each image's tokens before packing: of each [crops, H, tokens of a crop].

        Args:
            value: [P, H, N]: P pictures, H heads, N patches.
            crops: number of pictures of each image.
        """
        if self._has_class and self._full:  # [CLS] always stays
            value = pad(value, (1, 0))
        elif not self._has_class and not self._full:  # the first patch is left out as if it were a [CLS]
            value = value[..., 1:]
        beams = len(value) // sum(crops)  # older versions of generate expand pixels for beams, image by image
        return list(value.split([count for count in crops for _ in range(beams)])[::beams])


def _from_class(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the attention that [CLS], the first row, pays to each patch: [B, H, N]."""
    return attention_map(query[:, :, :1], key, mask, scaling)[:, :, 0, 1:]


def _received(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the attention that each patch receives, on average over query rows: [B, H, N]."""
    return attention_received(query, key, mask, scaling) / query.shape[2]


def _keys(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the key vectors of the patches, mean over heads, in float32 at least: [B, D, N]."""
    return key.to(torch.promote_types(key.dtype, torch.float32)).mean(1).transpose(1, 2)


def _keys_without_class(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the key vectors of the patches where the first row is [CLS], which is left out: [B, D, N].

    Mean over heads, in float32 at least.
    """
    return _keys(query, key, mask, scaling)[..., 1:]
