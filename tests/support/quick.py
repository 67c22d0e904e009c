"""Parameters of tests of which some run by default, and all in `make test-all`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], names: Container[str]) -> list[Any]:
    """Return parameters with the names of `values` as ids, slow but for those in `names`."""
    return [
        pytest.param(value, id=str(value), marks=() if str(value) in names else pytest.mark.slow) for value in values
    ]
