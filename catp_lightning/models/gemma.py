"""Gemma 3 and PaliGemma: every image has the same number of tokens, which attend to one another."""

from torch import Tensor

from catp_lightning.models.placeholder import Placeholder


class Gemma(Placeholder):
    """Gemma 3, and ShieldGemma 2, which is one that answers about the safety of an image."""

    types = ("gemma3", "shieldgemma2")
    classes = ("Gemma3ForConditionalGeneration",)


class PaliGemma(Placeholder):
    """PaliGemma 1 and 2, whose position ids begin at 1."""

    types = ("paligemma",)
    classes = ("PaliGemmaForConditionalGeneration",)

    def positions(self, mask: Tensor) -> Tensor:
        return super().positions(mask) + 1
