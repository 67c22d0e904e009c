"""Extension of mkdocstrings: examples in docstrings are shown as code.

"Example::", after which code follows, becomes a small title, and "Example:", after which a doctest follows, the section
that mkdocstrings knows.
"""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rewrites docstrings as they are read; the sources stay as they are."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example::$", "**Example**", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
