"""Fuyu: patches of an image go straight into the decoder, line by line, with a token of text at the end of a line."""

from collections.abc import Mapping

from catp_lightning.models.images import Image, Images
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.utils.on_cpu import on_cpu


class Fuyu(Placeholder):
    """Fuyu, whose prompts have one image each."""

    types = ("fuyu",)
    classes = ("FuyuForCausalLM",)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> Images:
        """Return images by placeholder id: all placeholders of a sample are of its image.

        The call's argument `pixel_values`, `image_patches` in older versions of transformers, has the patches of all
        images: [patches, D] or [1, patches, D].
        """
        token, given = self.model.config.image_token_id, prompt.arguments
        pixels = given.get("image_patches") if given.get("pixel_values") is None else given["pixel_values"]
        if pixels is None:
            return {}
        visual = on_cpu(prompt.ids)[0] == token
        sizes = visual.sum(1).tolist()
        begins = visual[:, 1:] & ~visual[:, :-1]
        lines = (begins.sum(1) + visual[:, 0]).clamp(min=1).tolist()
        parts = pixels.flatten(0, -2).split(sizes)
        return {
            token: [
                Image(size, part, shape=(rows, size // rows))
                for size, part, rows in zip(sizes, parts, lines, strict=True)
                if size
            ]
        }
