"""Molmo 2: an image is seen whole in low resolution and, cut into crops, in high resolution."""

from collections.abc import Mapping

import torch

from catp_lightning.models.images import Image, Images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt


class Molmo(Placeholder):
    """Molmo 2, whose image tokens attend to one another."""

    types = ("molmo2",)
    classes = ("Molmo2ForConditionalGeneration",)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images, or frames, by placeholder id; crop 0 of an image is the whole, crop 1 all of its crops.

        The call's arguments are `pixel_values` [crops, patches, D], `image_num_crops` [I] and `image_grids` [I, 4],
        rows and columns of tokens in low and in high resolution; or, of videos, `pixel_values_videos`
        [frames, patches, D] and `video_grids` [I, 3], frames, rows and columns.
        """
        token, given = int(self.model.config.image_token_id), prompt.arguments
        pixels, frames = given.get("pixel_values"), given.get("pixel_values_videos")
        if pixels is not None:
            parts = pixels.split(given["image_num_crops"].tolist())
            grids = given["image_grids"].tolist()
            sizes = [torch.tensor([a * b, c * d], device="cpu", dtype=torch.int64) for a, b, c, d in grids]
            numbers = [torch.arange(2, device="cpu", dtype=torch.int64).repeat_interleave(size) for size in sizes]
            return {token: [Image(len(own), part, crops=own) for own, part in zip(numbers, parts, strict=True)]}
        if frames is None:
            return {}
        shapes = [(rows, columns) for count, rows, columns in given["video_grids"].tolist() for _ in range(count)]
        return {
            token: [
                Image(rows * columns, frame, shape=(rows, columns))
                for frame, (rows, columns) in zip(frames, shapes, strict=True)
            ]
        }
