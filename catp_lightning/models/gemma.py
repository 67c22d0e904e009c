"""Gemma 3 and PaliGemma: every image has the same number of tokens, which attend to one another."""

from torch import Tensor, nn

from catp_lightning.models.placeholder import Placeholder


class Gemma(Placeholder):
    """Gemma 3."""

    types = ("gemma3",)
    classes = ("Gemma3ForConditionalGeneration",)

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_tower,)


class PaliGemma(Gemma):
    """PaliGemma 1 and 2, whose position ids begin at 1."""

    types = ("paligemma",)
    classes = ("PaliGemmaForConditionalGeneration",)

    def positions(self, mask: Tensor) -> Tensor:
        return super().positions(mask) + 1
