"""Data sets, and the models that come with the package."""

from pathlib import Path

from catp_lightning.errors import DataError

SHIPPED = ("digits_blip2", "digits_llava", "digits_mllama", "digits_qwen2_5_vl")

GRIDS = {
    "digits_blip2": ((4, 4),),
    "digits_llava": ((6, 6),),
    "digits_mllama": ((3, 3), (3, 6), (6, 3), (6, 6)),  # 1, 2, 2 and 4 tiles
    "digits_qwen2_5_vl": ((3, 3), (3, 6), (6, 4), (6, 6), (5, 10), (10, 10)),  # 36 to 400 visual tokens
}
"""Grids (rows, columns) of the scenes that each shipped model knows: the argument `grids` of `write_scenes`."""

PROMPTS = {
    "digits_blip2": "Question: {} Short answer:",
    "digits_llava": "<image> Question: {} Short answer:",
    "digits_mllama": "<|image|>Question: {} Short answer:",
    "digits_qwen2_5_vl": (
        "<|im_start|> user Picture 1: <|vision_start|><|image_pad|><|vision_end|> Question: {} Short answer:"
    ),
}
"""Prompt that each shipped model was trained with: the argument `prompt` of `VQADataModule`."""


def shipped(name: str) -> Path:
    """Return the folder of a shipped model and its processor; `name` is one of `SHIPPED`.

    All shipped models answer questions about digit scenes, on the grids of `GRIDS` and in the prompts of `PROMPTS`.

    Raises:
        DataError: no model of that name is shipped.
    """
    if name not in SHIPPED:
        raise DataError(f"There is no shipped model {name!r}; there are: {', '.join(SHIPPED)}.")
    return Path(__file__).parent / name
