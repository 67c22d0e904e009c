"""LLaVA-OneVision: SigLIP patches; an image is cut into crops, and a token ends each video."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from catp_lightning.models.images import Images, video_frames
from catp_lightning.models.llava_next import LlavaNext
from catp_lightning.prompt.prompt import DecoderPrompt


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision."""

    types = ("llava_onevision",)
    classes = ("LlavaOnevisionForConditionalGeneration",)

    def _videos(self, prompt: DecoderPrompt) -> Images:
        return video_frames(self.model, prompt, closing=1)

    def _pooled(self, value: Tensor) -> Tensor:
        """Return values of frames' tokens, resampled as the model resamples features."""
        return self.model.model.apply_pooling(self._selected(value).transpose(1, 2)).transpose(1, 2)

    def _of_videos(self, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        """Return the values of each frame's tokens; the newline that ends a video, in its last frame, has none."""
        frames, count = super()._of_videos(value, prompt), prompt.arguments["pixel_values_videos"].shape[1]
        return [pad(frame, (0, int(place % count == count - 1))) for place, frame in enumerate(frames)]

    def _packed(self, features: list[Tensor], arguments: Mapping[str, Any]) -> list[Tensor]:
        ratio = arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        newline = features[0].new_zeros(features[0].shape[-1])
        return self.model.model.pack_image_features(features, arguments["image_sizes"], newline, ratio)[0]
