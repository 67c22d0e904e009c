"""LLaVA-OneVision: SigLIP patches; an image is cut into crops, and a token ends each video."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from catp_lightning.models.images import Images, video_frames
from catp_lightning.models.llava_next import LlavaNext
from catp_lightning.prompt.prompt import DecoderPrompt


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision."""

    types = ("llava_onevision",)
    classes = ("LlavaOnevisionForConditionalGeneration",)

    def _videos(self, prompt: DecoderPrompt) -> Images:
        return video_frames(self.model, prompt, closing=1)

    def _packed(self, features: list[Tensor], arguments: Mapping[str, Any]) -> list[Tensor]:
        ratio = arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        newline = features[0].new_zeros(features[0].shape[-1])
        return self.model.model.pack_image_features(features, arguments["image_sizes"], newline, ratio)[0]
