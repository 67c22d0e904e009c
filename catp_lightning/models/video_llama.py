"""VideoLLaMA 3: images as in Qwen-VL; frames that resemble the one before lose tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from catp_lightning.models.gridded import Gridded


class VideoLlama(Gridded):
    """VideoLLaMA 3."""

    types = ("video_llama_3",)
    classes = ("VideoLlama3ForConditionalGeneration",)

    def sides(self, kind: str, arguments: Mapping[str, Any], count: int) -> list[int]:
        """Return the side, in patches, of the square that makes a token of each image: argument `image_merge_sizes`."""
        given = arguments.get(f"{kind}_merge_sizes")
        return super().sides(kind, arguments, count) if given is None else given.tolist()

    def patches(
        self, kind: str, arguments: Mapping[str, Any], shapes: Sequence[tuple[int, int]]
    ) -> Sequence[Tensor | None]:
        """Return the places of each frame's tokens.

        The argument `video_compression_mask`, bool for each token of all videos, says which of them the prompt has.
        """
        stays = arguments.get("video_compression_mask") if kind == "video" else None
        if stays is None:
            return super().patches(kind, arguments, shapes)
        return [own.nonzero()[:, 0] for own in stays.split([rows * columns for rows, columns in shapes])]
