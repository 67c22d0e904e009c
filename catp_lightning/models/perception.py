"""PerceptionLM: an image is cut into tiles, which stand in one run; a video has one tile for each frame."""

from collections.abc import Mapping

from torch import Tensor

from catp_lightning.models.images import Image, Images, joined
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt


class Perception(Placeholder):
    """PerceptionLM."""

    types = ("perception_lm",)
    classes = ("PerceptionLMForConditionalGeneration",)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images and frames by placeholder id; the tiles of an image are its crops.

        The call's arguments are `pixel_values` [I, tiles, C, H, W] and `pixel_values_videos` [I, frames, C, H, W].
        """
        config, given, found = self.model.config, prompt.arguments, Images()
        if (pixels := given.get("pixel_values")) is not None:
            tiles = self._pictures(pixels, counts[config.image_token_id])
            each = pixels.shape[1]
            found[config.image_token_id] = [joined(tiles[at : at + each]) for at in range(0, len(tiles), each)]
        if (pixels := given.get("pixel_values_videos")) is not None:
            found[config.video_token_id] = self._pictures(pixels, counts[config.video_token_id])
        return found

    @staticmethod
    def _pictures(pixels: Tensor, tokens: int) -> list[Image]:
        pictures = pixels.flatten(0, 1)
        return [Image(tokens // len(pictures), picture) for picture in pictures]
