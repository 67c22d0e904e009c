"""Idefics 2, Idefics 3 and SmolVLM: every picture, crops included, has the same number of tokens."""

from torch import nn

from catp_lightning.models.placeholder import Placeholder


class Idefics(Placeholder):
    """Idefics 2, Idefics 3 and its small descendant SmolVLM."""

    types = ("idefics2", "idefics3", "smolvlm")
    classes = (
        "Idefics2ForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    )
    can_replay = True

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_model,)
