"""Video-LLaVA: images and videos through towers of their own; each frame of a video begins with its [CLS]."""

from collections.abc import Mapping

from torch import nn

from catp_lightning.models.images import Images, video_frames
from catp_lightning.models.llava import Llava
from catp_lightning.prompt.prompt import DecoderPrompt


class VideoLlava(Llava):
    """Video-LLaVA."""

    types = ("video_llava",)
    classes = ("VideoLlavaForConditionalGeneration",)

    @property
    def tokens_per_image(self) -> int | None:
        return None

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.image_tower, self.model.model.video_tower)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        return {**video_frames(self.model, prompt, protected_first=True), **super().images(prompt, counts)}
