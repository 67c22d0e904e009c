"""Base class of models whose processor counts patches in a grid of time, height and width for each image."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from catp_lightning.models.images import Image, Images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt


class Gridded(Placeholder):
    """Model that reads images as Qwen-VL does: their patches lie one image after the other.

    Attributes:
        frames_as_images: True if prompts mark frames of videos like images: by the image token between a start and an
            end token.
        frames_joined: number of steps of a video's time axis whose patches make the tokens of one frame.
    """

    frames_as_images: ClassVar[bool] = False
    frames_joined: ClassVar[int] = 1

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images and frames by placeholder id, in the order of their features.

        The call's arguments `image_grid_thw` and `video_grid_thw`, [I, 3], count patches by time, height and width;
        each time step is a frame. A square of patches makes a token.
        """
        config, given = self.model.config, prompt.arguments
        found: Images = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pixels, grids = given.get(name), given.get(f"{kind}_grid_thw")
            if pixels is None or grids is None:
                continue
            token = config.image_token_id if self.frames_as_images else getattr(config, f"{kind}_token_id")
            joins = self.frames_joined if kind == "video" else 1
            shapes = [
                (height // side, width // side)
                for (time, height, width), side in zip(grids.tolist(), self.sides(kind, given, len(grids)), strict=True)
                for _ in range(time // joins)
            ]
            areas = [joins * height * width for time, height, width in grids.tolist() for _ in range(time // joins)]
            images = [
                Image(rows * columns if own is None else len(own), part, shape=(rows, columns), patches=own)
                for (rows, columns), own, part in zip(
                    shapes, self.patches(kind, given, shapes), pixels.split(areas), strict=True
                )
            ]
            # A frame that resembles the one before may have no token left.
            found[int(token)] = found.get(int(token), []) + [image for image in images if image.tokens]
        return found

    def sides(self, kind: str, arguments: Mapping[str, Any], count: int) -> list[int]:
        """Return the side, in patches, of the square that makes a token of each image.

        Args:
            kind: "image" or "video".
            arguments: arguments of the model's call.
            count: number of images or videos.
        """
        return [self.model.config.vision_config.spatial_merge_size] * count

    def patches(
        self, kind: str, arguments: Mapping[str, Any], shapes: Sequence[tuple[int, int]]
    ) -> Sequence[Tensor | None]:
        """Return the places, int64 [tokens], that the tokens of each image or frame have; None: all, in their order.

        Args:
            kind: "image" or "video".
            arguments: arguments of the model's call.
            shapes: rows and columns of each image or frame, in tokens.
        """
        return [None] * len(shapes)
