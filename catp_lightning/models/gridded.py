"""Base class of models whose processor counts patches in a grid of time, height and width for each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from catp_lightning.models.images import Image, Images
from catp_lightning.models.towers import Tower, Towered, of_first_beams
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.on_cpu import on_cpu, on_device


@dataclass(frozen=True)
class PatchedImage(Image):
    """Image whose pixels are a row for each patch: [patches, 3 * S * P * P], S steps of time, P pixels a side.

    The patches of a token follow one another, line by line, and tokens do so as well.

    Attributes:
        side: patches a side of the square that makes a token.
        patch: pixels a side of a patch; None: it is not known how the pixels of a patch lie in its row.
    """

    side: int = 1
    patch: int | None = None

    def pictures(self) -> list[Tensor]:
        rows, columns = self.shape or (0, 0)
        if self.patch is None or self.pixels.dim() != 2 or self.pixels.shape[1] % (3 * self.patch**2):
            return []
        first = self.pixels[: rows * columns * self.side**2]  # of several steps of time
        squares = first.view(rows, columns, self.side, self.side, 3, -1, self.patch, self.patch)[:, :, :, :, :, 0]
        wide = squares.permute(4, 0, 2, 5, 1, 3, 6)  # channel, row of token, of patch, of pixel, and columns alike
        return [wide.flatten(4, 6).flatten(1, 3)]


class Gridded(Towered):
    """Model that reads images as Qwen-VL does: their patches lie one image after the other.

    Towers with Qwen-VL's blocks are observed. They have no [CLS]: attention is what a patch receives from its image or
    frame. Qwen2.5's attends to whole images in some blocks alone (`fullatt_block_indexes`), and in the others within
    windows. A patch's share of its window says nothing about patches of other windows, and is larger in the small
    windows at an image's edge, so the layers of the attention signal are the blocks that attend to whole images,
    numbered from 0. Keys, which are compared with one another and have no shares, are of all blocks.

    Attributes:
        tower: name of the tower below the head, if it has Qwen-VL's blocks; empty: its attention is not observed.
        frames_as_images: True if prompts mark frames of videos like images: by the image token between a start and an
            end token.
        frames_joined: number of steps of a video's time axis whose patches make the tokens of one frame.
        channels_first: True if a patch's row of pixels is by channel, step of time, row and column, as Qwen-VL's.
    """

    tower: ClassVar[str] = ""
    frames_as_images: ClassVar[bool] = False
    frames_joined: ClassVar[int] = 1
    channels_first: ClassVar[bool] = True

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images and frames by placeholder id, in the order of their features.

        The call's arguments `image_grid_thw` and `video_grid_thw`, [I, 3], count patches by time, height and width;
        each time step is a frame. A square of patches makes a token.
        """
        given = prompt.arguments
        found: Images = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pixels, grids = given.get(name), given.get(f"{kind}_grid_thw")
            if pixels is None or grids is None:
                continue
            token = self.kinds(given)[kind]
            joins = self.frames_joined if kind == "video" else 1
            frames = [
                (height // side, width // side, side)
                for (time, height, width), side in zip(grids.tolist(), self.sides(kind, given, len(grids)), strict=True)
                for _ in range(time // joins)
            ]
            shapes = [(rows, columns) for rows, columns, _ in frames]
            areas = [joins * height * width for time, height, width in grids.tolist() for _ in range(time // joins)]
            patch = getattr(self.model.config.vision_config, "patch_size", None) if self.channels_first else None
            images: list[Image] = [
                PatchedImage(
                    rows * columns if own is None else len(own),
                    part,
                    shape=(rows, columns),
                    patches=own,
                    side=side,
                    patch=patch,
                )
                for (rows, columns, side), own, part in zip(
                    frames, self.patches(kind, given, shapes), pixels.split(areas), strict=True
                )
            ]
            # A frame that resembles the one before may have no token left.
            found[int(token)] = found.get(int(token), []) + [image for image in images if image.tokens]
        return found

    @property
    def towers(self) -> Sequence[Tower]:
        tower: Any = getattr(self.model.model, self.tower, None) if self.tower else None
        if not hasattr(tower, "blocks"):
            return []
        blocks = [block.attn for block in tower.blocks]
        whole = getattr(tower.config, "fullatt_block_indexes", None)
        return [Tower(tower, blocks, None if whole is None else [blocks[index] for index in sorted(whole)])]

    def of_patches(self, kind: str, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        """Return means over the patches of each token, which follow one another."""
        side = self.model.config.vision_config.spatial_merge_size
        grids = prompt.arguments[f"{kind}_grid_thw"].tolist()
        samples = (on_cpu(prompt.ids)[0] == self.kinds(prompt.arguments)[kind]).sum(1) * side**2  # patches of each
        tokens = of_first_beams(value[0], samples.tolist(), 1).unflatten(1, (-1, side**2)).mean(2)
        shapes = [(height // side, width // side) for time, height, width in grids for _ in range(time)]
        frames = tokens.split([rows * columns for rows, columns in shapes], 1)
        return [self._in_lines(frame, shape) for frame, shape in zip(frames, shapes, strict=True)]

    def _in_lines(self, frame: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return a frame's values [D, tokens] line by line; a tower that has windows reads one window after the other.

        Args:
            frame: the values in the tower's order.
            shape: rows and columns of the frame, in tokens.
        """
        vision = self.model.config.vision_config
        if getattr(vision, "window_size", None) is None:
            return frame
        side = vision.spatial_merge_size
        grid = torch.tensor([[1, shape[0] * side, shape[1] * side]], dtype=torch.int64, device="cpu")
        order, _ = get_vision_window_index(grid, side, vision.window_size, vision.patch_size)
        return frame[:, on_device(order.argsort(), frame.device)]

    def kinds(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        found = super().kinds(arguments)
        return {kind: int(self.model.config.image_token_id) for kind in found} if self.frames_as_images else found

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
