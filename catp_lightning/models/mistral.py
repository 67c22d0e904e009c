"""Mistral 3 and LightOnOCR: images keep their own size and are padded to the largest."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from catp_lightning.models.images import Images, sized_images
from catp_lightning.models.towers import Tower, Towered, known_tower, of_sized_images
from catp_lightning.prompt.prompt import DecoderPrompt


class Mistral(Towered):
    """Mistral 3, and LightOnOCR, which reads images like it: squares of patches make a token."""

    types = ("lighton_ocr", "mistral3")
    classes = ("LightOnOcrForConditionalGeneration", "Mistral3ForConditionalGeneration")

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self._reader,)

    @property
    def _reader(self) -> Any:
        model = self.model.model
        return getattr(model, "vision_tower", None) or model.vision_encoder

    @property
    def towers(self) -> Sequence[Tower]:
        known = known_tower(self._reader, getattr(self.model.config, "vision_feature_layer", -1))
        return [] if known is None else [known]

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        return sized_images(self.model, prompt, counts)

    def of_patches(self, kind: str, value: Tensor, prompt: DecoderPrompt) -> list[Tensor]:
        return of_sized_images(self.model, value[0], prompt.arguments["image_sizes"])
