"""Lines and warnings of ours, in which what others named cannot act on the terminal that shows them."""

import warnings

from catp_lightning.safe_text import one_line


def rank_zero_info(message: str) -> None:
    """Lightning's, of one line that is safe to show."""
    from lightning.pytorch.utilities import rank_zero

    rank_zero.rank_zero_info(one_line(message))


def rank_zero_warn(message: str) -> None:
    """Lightning's, alike; told at the caller's line."""
    from lightning.pytorch.utilities import rank_zero

    rank_zero.rank_zero_warn(one_line(message), stacklevel=5)


def warn(message: str, stacklevel: int = 1) -> None:
    """`warnings.warn`, alike; `stacklevel` counts from the caller."""
    warnings.warn(one_line(message), stacklevel=stacklevel + 1)
