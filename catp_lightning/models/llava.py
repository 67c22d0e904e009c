"""LLaVA family: CLIP or SigLIP patches, projected one by one; some models cut an image into crops, some read videos."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Signal, Values
from catp_lightning.models.base import AttentionSite
from catp_lightning.models.layout import Image, equal_images, pictures, sized_images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.attention import attention_map, attention_received
from catp_lightning.prompt.masks import window
from catp_lightning.prompt.prompt import DecoderPrompt

TYPES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
    "vipllava": "VipLlavaForConditionalGeneration",
}
CUT = {"llava_next", "llava_next_video", "llava_onevision"}
WITH_CLASS = {"clip_vision_model"}
WITHOUT_CLASS = {"siglip_vision_model"}


class Llava(Placeholder):
    """LLaVA-1.5 and its descendants.

    For images, the attention of the vision tower is observed in the layer whose output is projected and in those before
    it: what [CLS] pays to each patch, or what a patch receives if the tower has no [CLS]. For videos it is not.
    """

    classes = tuple(sorted(TYPES.values()))
    types = TYPES

    @classmethod
    def handles(cls, model: PreTrainedModel) -> bool:
        return model.config.model_type in TYPES and super().handles(model)

    @property
    def kind(self) -> str:
        return str(self.model.config.model_type)

    @property
    def replayable(self) -> bool:
        return window(self.decoder_config) is None

    @property
    def tokens_per_image(self) -> int | None:
        if self.kind not in ("llava", "vipllava") or self.model.config.vision_config.model_type == "pixtral":
            return None
        if not self._has_class and not self._full:  # the model leaves out the first patch as if it were a [CLS]
            return self._patches() - 1
        return self._patches() + int(self._has_class and self._full)

    @property
    def has_grid(self) -> bool:
        return self.tokens_per_image == self._patches()

    @property
    def most_tokens(self) -> int | None:
        pinpoints = getattr(self.model.config, "image_grid_pinpoints", None)
        if self.kind not in CUT or not pinpoints:
            return self.tokens_per_image
        side = self.model.config.vision_config.image_size
        crops = max(-(-height // side) * -(-width // side) for height, width in pinpoints)
        return (crops + 1) * self._patches()

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

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> dict[int, list[Image]]:
        found = self._videos(prompt)
        if pictures(prompt.arguments) is None:
            return found
        if self.kind in CUT:
            return {**found, int(self.model.config.image_token_id): self._cut_images(prompt)}
        if self.model.config.vision_config.model_type == "pixtral":
            return {**found, **sized_images(self.model, prompt, counts)}
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
        return {**found, **own}

    @property
    def _has_class(self) -> bool:
        return self.model.config.vision_config.model_type in WITH_CLASS

    @property
    def _full(self) -> bool:
        """True if the tower's first row, [CLS] where it has one, is a token too."""
        return getattr(self.model.config, "vision_feature_select_strategy", "default") == "full"

    def _videos(self, prompt: DecoderPrompt) -> dict[int, list[Image]]:
        videos = prompt.arguments.get("pixel_values_videos")
        if videos is None:
            return {}
        token = int(self.model.config.video_token_id)
        tokens, frames = int((prompt.ids == token).sum()) // len(videos), videos.shape[1]
        newline = int(self.kind == "llava_onevision")  # the token that ends a video
        each = (tokens - newline) // frames
        protected = None
        if self.kind == "video_llava":  # each frame begins with its [CLS]
            protected = torch.arange(each, device=videos.device) == 0
        plain = [Image(each, frame, protected) for video in videos for frame in video]
        if newline:
            closing = torch.arange(each + newline, device=videos.device) >= each
            for end in range(frames - 1, len(plain), frames):
                plain[end] = Image(each + newline, plain[end].pixels, closing)
        return {token: plain}

    def _cut_images(self, prompt: DecoderPrompt) -> list[Image]:
        """Return images that are cut into crops.

        The model's own packing says where tokens of each crop and line ends come to lie.
        """
        pixels, crops = prompt.arguments["pixel_values"], self._crop_counts(prompt.arguments)
        if pixels.dim() == 5:  # padded to the largest number of crops
            own = [image[:count] for image, count in zip(pixels, crops, strict=True)]
        else:
            own = list(pixels.split(crops))
        places = [torch.eye(count, max(crops), dtype=torch.float32, device=pixels.device) for count in crops]
        of_crop = [place[:, None].expand(-1, self._patches(), -1) for place in places]
        return [
            Image(
                len(share), image, protected=share.sum(1) < 0.5, crops=share.argmax(1)
            )  # a resampled token is of the crop with the largest share
            for share, image in zip(self._packed(of_crop, prompt.arguments), own, strict=True)
        ]

    def _side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def _patches(self) -> int:
        return self._side() ** 2

    def _crop_counts(self, arguments: Mapping[str, Any]) -> list[int]:
        sizes, config, several = arguments["image_sizes"], self.model.config, arguments.get("batch_num_images")
        cut = [True] * len(sizes) if several is None else [n == 1 for n in several for _ in range(n)]
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if own else 1
            for size, own in zip(sizes, cut, strict=True)
        ]

    def _packed(self, features: list[Tensor], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Pack values of each patch of each crop as the model packs features.

        Args:
            features: of each image [crops, patches, F].
            arguments: arguments of the model's call.

        Returns:
            Of each image [tokens, F], 0 at line ends.
        """
        model, width = self.model.model, features[0].shape[-1]
        newline = features[0].new_zeros(width)
        if self.kind == "llava_onevision":
            ratio = arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
            return model.pack_image_features(features, arguments["image_sizes"], newline, ratio)[0]
        return model.pack_image_features(features, arguments["image_sizes"], "default", newline)[0]

    def on_tokens(self, values: Values, prompt: DecoderPrompt) -> dict[Any, list[Tensor]]:
        if values and prompt.arguments.get("pixel_values_videos") is not None:
            raise PruningError(
                f"Attention in the vision tower of {type(self.model).__name__} is observed for images, not for videos. "
                "Give videos a batch of their own, and a policy whose scorer reads none (l2-norm, stride, random)."
            )
        return {key: self._of_images(value, prompt.arguments) for key, value in values.items()}

    def _of_images(self, value: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Regroup attention of pictures by the images that they are crops of, in the order of the images' tokens.

        Args:
            value: [P, H, N]: P pictures, H heads, N patches.
            arguments: arguments of the model's call.

        Returns:
            Of each image [H, tokens].
        """
        crops = self._crop_counts(arguments) if self.kind in CUT else [1] * len(arguments["pixel_values"])
        if self._has_class and self._full:  # [CLS] always stays
            value = pad(value, (1, 0))
        elif not self._has_class and not self._full:  # the first patch is left out as if it were a [CLS]
            value = value[..., 1:]
        beams = len(value) // sum(crops)  # older versions of generate expand pixels for beams, image by image
        pictures = value.split([count for count in crops for _ in range(beams)])[::beams]
        if self.kind not in CUT:
            return [picture[0] for picture in pictures]
        return [packed.T for packed in self._packed([picture.transpose(1, 2) for picture in pictures], arguments)]


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
