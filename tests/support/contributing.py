"""What CONTRIBUTING.md says, section by section."""

import re

from tests.support.paths import ROOT


def section(title: str) -> str:
    """Return the text of a section, without its title."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.split(r"^## ", text.split(f"## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
