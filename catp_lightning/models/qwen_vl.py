"""Qwen-VL: patches of images and frames in a grid, which multimodal rotary positions count by time, row and column."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from catp_lightning.models.gridded import Gridded
from catp_lightning.models.towers import Tower, Towered, of_first_beams
from catp_lightning.prompt.prompt import DecoderPrompt


class QwenVL(Towered, Gridded):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, and the thinkers of Qwen2.5-Omni and Qwen3-Omni.

    Their towers have no [CLS]: attention is what a patch receives from its image or frame. Qwen2.5's attends to whole
    images in some blocks alone (`fullatt_block_indexes`), and in the others within windows. A patch's share of its
    window says nothing about patches of other windows, and is larger in the small windows at an image's edge, so the
    layers of the attention signal are the blocks that attend to whole images, numbered from 0. Keys, which are compared
    with one another and have no shares, are of all blocks.
    """

    types = (
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen2_5_omni_thinker",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_omni_moe_thinker",
    )
    classes = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )

    @property
    def towers(self) -> Sequence[Tower]:
        visual: Any = self.model.model.visual
        blocks = [block.attn for block in visual.blocks]
        whole = getattr(visual.config, "fullatt_block_indexes", None)
        return [Tower(visual, blocks, None if whole is None else [blocks[index] for index in sorted(whole)])]

    def of_patches(self, kind: str, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        """Return means over the patches of each token, which follow one another."""
        side = self.model.config.vision_config.spatial_merge_size
        grids = prompt.arguments[f"{kind}_grid_thw"].tolist()
        samples = (prompt.ids == self.kinds(prompt.arguments)[kind]).sum(1) * side**2  # patches of each
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
        return frame[:, order.argsort().to(frame.device)]
