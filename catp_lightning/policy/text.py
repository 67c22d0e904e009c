"""Short text of a policy, and of values that a policy should not hold."""

import reprlib
from dataclasses import fields
from typing import Any

SHORT = reprlib.Repr()
"""Repr of any value, cut."""
SHORT.maxstring = SHORT.maxother = 40
SHORT.maxdict = SHORT.maxlist = 4
SHORT.maxlevel = 3


def short_text(policy: Any) -> str:
    """Return a `PruningPolicy` as short text: scorer, budget and fields that differ from their defaults."""
    shown = [f"scorer={policy.scorer!r}", f"keep={policy.keep!r}"]
    for part in fields(policy):
        value = getattr(policy, part.name)
        if part.name in ("scorer", "keep", "format_version") or value in (None, {}, (), "original"):
            continue
        if part.name == "then":
            shown.append(f"then=[{', '.join(f'{stage.scorer} at {stage.keep!r}' for stage in value)}]")
        elif part.name == "evidence":
            chosen = f", chosen {SHORT.repr(value['chosen'])}" if "chosen" in value else ""
            shown.append(f"evidence=<{len(value)} entries{chosen}>")
        else:
            shown.append(f"{part.name}={SHORT.repr(dict(value) if isinstance(value, dict) else value)}")
    return f"{type(policy).__name__}({', '.join(shown)})"
