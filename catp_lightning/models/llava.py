"""LLaVA-1.5 and VipLLaVA: CLIP, SigLIP or Pixtral patches, projected one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from catp_lightning.methods.observation import Signal
from catp_lightning.models.base import OutputSite
from catp_lightning.models.images import Images, equal_images, pictures, sized_images
from catp_lightning.models.towers import (
    WITH_CLASS,
    Tower,
    Towered,
    known_tower,
    of_first_beams,
    of_pictures,
    of_sized_images,
)
from catp_lightning.prompt.prompt import DecoderPrompt


class Llava(Towered):
    """LLaVA-1.5, VipLLaVA, and base class of their descendants.

    The attention of the vision tower is observed in the layer whose output is projected and in those before it: what
    [CLS] pays to each patch, or what a patch receives if the tower has no [CLS]. Of several layers that are projected
    together (VipLLaVA) the deepest counts.
    """

    types: ClassVar[tuple[str, ...]] = ("llava", "vipllava")
    classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration", "VipLlavaForConditionalGeneration")
    readers: ClassVar[tuple[str, ...]] = ("vision_tower",)
    """Names of the towers that read images and videos; most models have one for both."""

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
        return tuple(getattr(self.model.model, name) for name in self.readers)

    @property
    def towers(self) -> Sequence[Tower]:
        config: Any = self.model.config
        layers: Any = getattr(config, "vision_feature_layer", None)
        layers = config.vision_feature_layers if layers is None else layers  # VipLLaVA's, up to 5.22
        return [
            tower
            for name in self.readers
            if (tower := known_tower(getattr(self.model.model, name), layers)) is not None
        ]

    @property
    def signals(self) -> frozenset[Signal]:
        """Signals without layers; `Signal.VISION_STATES` where one layer of one CLIP tower is projected, of images."""
        config: Any = self.model.config
        one = isinstance(getattr(config, "vision_feature_layer", None), int) and len(self.readers) == 1
        images = getattr(config, "video_token_id", None) is None
        return super().signals | ({Signal.VISION_STATES} if self._has_class and one and images else set())

    def output_site(self, signal: Signal) -> OutputSite:
        """Return the input of the projector, patch by patch, without [CLS]: [P, D, N]."""
        patches = self._patches()
        return OutputSite(
            self.model.model.multi_modal_projector,
            lambda args, kwargs, output: args[0][:, -patches:].transpose(1, 2),
        )

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        if pictures(prompt.arguments) is None:
            return {}
        if self._sized:
            return sized_images(self.model, prompt, counts)
        own = equal_images(self.model, prompt, counts)
        if self._has_class and self._full:  # [CLS] is one of the tokens
            own = {
                id_: [replace(one, protected=torch.arange(one.tokens, device="cpu") == 0) for one in all_]
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

    def of_patches(self, kind: str, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        return self._of_videos(value, prompt) if kind == "video" else self._of_images(value, prompt.arguments)

    def _of_images(self, value: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Regroup values of pictures by the images that they are, in the order of the images' tokens.

        Args:
            value: [P, D, N]: P pictures, N patches of each; Pixtral's tower has all patches in one row, P is 1.
            arguments: arguments of the model's call.

        Returns:
            Of each image [D, tokens].
        """
        if self._sized:
            return of_sized_images(self.model, value[0], arguments["image_sizes"])
        return list(of_pictures(self._selected(value), arguments))

    def _selected(self, value: Tensor) -> Tensor:
        """Return the values [P, D, patches] of those rows of the tower that are projected: [P, D, rows]."""
        if self._has_class and self._full:  # [CLS] always stays
            return pad(value, (1, 0))
        if not self._has_class and not self._full:  # the first patch is left out as if it were a [CLS]
            return value[..., 1:]
        return value

    def _of_videos(self, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        """Return the values of each frame's tokens, pooled as the model pools features: of each [D, tokens].

        Args:
            value: [P, D, N], patches of all frames.
            prompt: the prompts that the videos belong to.
        """
        videos = prompt.arguments["pixel_values_videos"]
        own = of_first_beams(value, [videos.shape[1]] * len(videos), 0)
        return list(self._pooled(own))

    def _pooled(self, value: Tensor) -> Tensor:
        """Return values of frames' tokens, [P, D, tokens], of those of their patches, [P, D, patches]."""
        return value
