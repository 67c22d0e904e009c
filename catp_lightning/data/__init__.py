"""Data sets, and the models that come with the package."""

from pathlib import Path

from catp_lightning.errors import DataError

SHIPPED = ("digits_blip2", "digits_llava", "digits_mllama")

GRIDS = {
    "digits_blip2": ((4, 4),),
    "digits_llava": ((6, 6),),
    "digits_mllama": ((3, 3), (3, 6), (6, 3), (6, 6)),  # of 1, 2, 2 and 4 tiles
}
"""For each shipped model the scenes it knows: `grids` of `write_scenes`."""

PROMPTS = {
    "digits_blip2": "Question: {} Short answer:",
    "digits_llava": "<image> Question: {} Short answer:",
    "digits_mllama": "<|image|>Question: {} Short answer:",
}
"""For each shipped model the prompt it was trained with: `prompt` of `VQADataModule`."""


def shipped(name: str) -> Path:
    """The folder of a model that comes with the package, with its processor: one of `SHIPPED`.

    All answer questions about digit scenes, on the grids of `GRIDS` and in the prompts of `PROMPTS`.

    Raises:
        DataError: no model of that name is shipped.
    """
    if name not in SHIPPED:
        raise DataError(f"There is no shipped model {name!r}; there are: {', '.join(SHIPPED)}.")
    return Path(__file__).parent / name
