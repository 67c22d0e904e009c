"""Extension of mkdocstrings: "Example::" of a docstring, after which code follows, is shown as a small title."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rewrites docstrings as they are read; the sources stay as they are."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example::$", "**Example**", obj.docstring.value, flags=re.MULTILINE)
