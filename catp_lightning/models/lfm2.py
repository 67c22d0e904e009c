"""LFM2-VL: images of their own size, and a decoder in which short convolutions and attention take turns."""

from collections.abc import Mapping

from catp_lightning.models.images import Image, Images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt


class Lfm2(Placeholder):
    """LFM2-VL."""

    types = ("lfm2_vl",)
    classes = ("Lfm2VlForConditionalGeneration",)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images by placeholder id; a large one is cut, and each crop is an image.

        The call's arguments are `pixel_values` [I, patches of the largest, D], and `spatial_shapes` [I, 2], which
        counts patches by height and width. A square of patches makes a token.
        """
        config, given = self.model.config, prompt.arguments
        pixels, shapes = given.get("pixel_values"), given.get("spatial_shapes")
        if pixels is None or shapes is None:
            return {}
        side = config.downsample_factor
        return {
            int(config.image_token_id): [
                Image(
                    (height // side) * (width // side), patches[: height * width], shape=(height // side, width // side)
                )
                for patches, (height, width) in zip(pixels, shapes.tolist(), strict=True)
            ]
        }
