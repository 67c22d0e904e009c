"""Data sets, and the models that come with the package."""

from pathlib import Path

from catp_lightning.errors import DataError

SHIPPED = ("digits_blip2",)


def shipped(name: str) -> Path:
    """The folder of a model that comes with the package, with its processor; "digits_blip2" answers about digit scenes.

    Raises:
        DataError: no model of that name is shipped.
    """
    if name not in SHIPPED:
        raise DataError(f"There is no shipped model {name!r}; there are: {', '.join(SHIPPED)}.")
    return Path(__file__).parent / name
