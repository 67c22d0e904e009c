"""Video-LLaVA: images and videos through towers of their own; each frame of a video begins with its [CLS]."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from catp_lightning.models.images import Images, video_frames
from catp_lightning.models.llava import Llava
from catp_lightning.prompt.prompt import DecoderPrompt


class VideoLlava(Llava):
    """Video-LLaVA."""

    types = ("video_llava",)
    classes = ("VideoLlavaForConditionalGeneration",)
    readers = ("image_tower", "video_tower")

    @property
    def tokens_per_image(self) -> int | None:
        return None

    def _pooled(self, value: Tensor) -> Tensor:
        """Return values of frames' tokens; each frame's [CLS] is one of them, has no value and always stays."""
        return pad(value, (1, 0))

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        return {**video_frames(self.model, prompt, protected_first=True), **super().images(prompt, counts)}
