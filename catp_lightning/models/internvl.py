"""InternVL: an image is cut into tiles, each with the same number of tokens."""

from collections.abc import Mapping

from torch import nn

from catp_lightning.models.images import Image, Images, equal_images, joined
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt


class InternVL(Placeholder):
    """InternVL, as Hugging Face has it."""

    types = ("internvl",)
    classes = ("InternVLForConditionalGeneration",)
    can_replay = True

    @property
    def pixel_readers(self) -> tuple[nn.Module, ...]:
        return (self.model.model.vision_tower,)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images by placeholder id; the tiles of one image stand in one run of placeholders."""
        (token, tiles), *_ = equal_images(self.model, prompt, counts).items() or [(0, [])]
        columns = (prompt.ids == token).flatten().nonzero()[:, 0].tolist()
        images: list[list[Image]] = []
        place = 0
        for tile in tiles:
            joins = place > 0 and columns[place] == columns[place - 1] + 1 and columns[place] % prompt.ids.shape[1] > 0
            images[-1].append(tile) if joins else images.append([tile])
            place += tile.tokens
        return {token: [joined(own) for own in images]}
