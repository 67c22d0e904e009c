"""Gemma 3, Gemma 4 and PaliGemma. Images of Gemma 4 keep their own size; others have equally many tokens."""

from collections.abc import Mapping

from torch import Tensor

from catp_lightning.models.images import Image, Images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt


class Gemma(Placeholder):
    """Gemma 3, and ShieldGemma 2, which is one that answers about the safety of an image."""

    types = ("gemma3", "shieldgemma2")
    classes = ("Gemma3ForConditionalGeneration",)


class PaliGemma(Placeholder):
    """PaliGemma 1 and 2, whose position ids begin at 1."""

    types = ("paligemma",)
    classes = ("PaliGemmaForConditionalGeneration",)

    def positions(self, mask: Tensor) -> Tensor:
        return super().positions(mask) + 1


class Gemma4(Placeholder):
    """Gemma 4."""

    types = ("gemma4", "gemma4_unified")
    classes = ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration")

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images and frames by placeholder id.

        The call's arguments are `pixel_values` [I, patches, D] and `image_position_ids` [I, patches, 2], column and
        row of each patch, -1 for padding; of frames `pixel_values_videos` and `video_position_ids`, by video in older
        versions of transformers. A square of patches makes a token, but in Gemma 4 Unified each patch is one.
        """
        config, given, found = self.model.config, prompt.arguments, Images()
        side = 1 if config.model_type == "gemma4_unified" else config.vision_config.pooling_kernel_size
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pixels, places = given.get(name), given.get(f"{kind}_position_ids")
            if pixels is None or places is None:
                continue
            found[int(getattr(config, f"{kind}_token_id"))] = [
                Image(
                    int(real.sum()) // side**2,
                    patches[real],
                    shape=((int(own[:, 1].max()) + 1) // side, (int(own[:, 0].max()) + 1) // side),
                )
                for patches, own in zip(pixels.flatten(0, -3), places.flatten(0, -3), strict=True)
                for real in [(own != -1).all(-1)]
            ]
        return found
