"""Lines and warnings of this package, escaped: names that others chose cannot act on the terminal that shows them."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from catp_lightning.safe_text import one_line


def rank_zero_info(message: str) -> None:
    """Call Lightning's `rank_zero_info` with the message as one line that is safe to show."""
    from lightning.pytorch.utilities import rank_zero

    rank_zero.rank_zero_info(one_line(message))


def rank_zero_warn(message: str) -> None:
    """Call Lightning's `rank_zero_warn` with the message as one safe line; the warning is told at the caller's line."""
    from lightning.pytorch.utilities import rank_zero

    rank_zero.rank_zero_warn(one_line(message), stacklevel=5)


def warn(message: str, stacklevel: int = 1) -> None:
    """Call `warnings.warn` with the message as one safe line; `stacklevel` counts from the caller."""
    warnings.warn(one_line(message), stacklevel=stacklevel + 1)


_FILTERS = threading.Lock()
"""Lock on the process's warning filters: threads that change and restore them in turn could leave the changed ones."""


@contextmanager
def without_warnings(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Context without warnings of a category whose text begins with a match of `message`; one thread at a time."""
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield


@contextmanager
def quiet(ours: bool = True) -> Iterator[None]:
    """Context without the lines and warnings of Lightning, which each of forty trainers would repeat.

    `ours`: lines that begin with "catp:" stay.
    """
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    only_ours = lambda record: ours and record.getMessage().startswith("catp:")  # noqa: E731
    logger.addFilter(only_ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        try:
            yield
        finally:
            logger.removeFilter(only_ours)
