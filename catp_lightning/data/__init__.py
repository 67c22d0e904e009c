"""Data sets, and the models that come with the package."""

from pathlib import Path

from catp_lightning.errors import DataError

SHIPPED = ("digits_blip2", "digits_llava", "digits_mllama")


def shipped(name: str) -> Path:
    """The folder of a model that comes with the package, with its processor. All answer questions about digit scenes.

    - digits_blip2: 4 x 4 cells, `write_scenes` without `grids`; prompt "Question: {} Short answer:".
    - digits_llava: `grids=((6, 6),)`; prompt "<image> Question: {} Short answer:".
    - digits_mllama: `grids=((3, 3), (3, 6), (6, 3), (6, 6))`, of 1, 2, 2 and 4 tiles; prompt
      "<|image|>Question: {} Short answer:".

    Raises:
        DataError: no model of that name is shipped.
    """
    if name not in SHIPPED:
        raise DataError(f"There is no shipped model {name!r}; there are: {', '.join(SHIPPED)}.")
    return Path(__file__).parent / name
