"""Mistral 3 and LightOnOCR: images keep their own size and are padded to the largest."""

from collections.abc import Mapping

from torch import nn

from catp_lightning.models.images import Images, sized_images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt


class Mistral(Placeholder):
    """Mistral 3, and LightOnOCR, which reads images like it."""

    types = ("lighton_ocr", "mistral3")
    classes = ("LightOnOcrForConditionalGeneration", "Mistral3ForConditionalGeneration")

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_tower,)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        return sized_images(self.model, prompt, counts)
