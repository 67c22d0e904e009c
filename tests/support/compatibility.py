"""Write docs/compatibility.md: the versions that tests run with, and which methods work on which model classes.

    python -m tests.support.compatibility

Versions are read from pyproject.toml and the constraints. Whether a method works is found out by making the pruner of a
small model of each class, as `prune` does.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from string import ascii_lowercase
from typing import Any

from catp_lightning import PolicyError, PruningError, PruningPolicy
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.models import Family, find_family
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.safe_text import Markdown
from catp_lightning.utils.markdown import markdown_table
from tests.support.compressors import COMPRESSORS, compressor, exiting
from tests.support.paths import ROOT
from tests.support.questions import learned
from tests.support.rows import Row
from tests.support.rules import early

PAGE = ROOT / "docs" / "compatibility.md"
SETS = {
    "oldest (`make test-oldest`)": "constraints-oldest.txt",
    "newest (`make test`)": "constraints.txt",
    "beside lmms-eval (`make test-lmms`)": "constraints-lmms.txt",
}
GROUPS: Mapping[str, Sequence[str]] = {
    "any": ("divprune", "learned", "l2-norm", "position", "stride", "random"),
    "text": ("cdpruner",),
    "tower": ("fastervlm", "vtc-cls", "vispruner", "visionzip"),
    "Q-Former": ("catp", "cross-attention", "region-attention", "self-attention"),
    "inside": ("fastv", "pyramiddrop", "sparsevlm", "dart", "visual-exit", "dyvte"),
    "cross": ("trimmed-llama",),
    "guide": ("sgl",),
    "compressors": ("quecc", "flashsloth"),
    "grid": ("grid",),
    "square": ("downsample",),
}
"""Methods that run on the same models, by the head of their column."""
HEAD = """\
# Compatibility

What the tests run with, and what works on what. A test computes this page and compares: it is written by
`python -m tests.support.compatibility`, not by hand.

## Versions

What `pip` may install, and the sets of versions that the tests are run with. Python of the sets is {python}.

{versions}
Other versions within the ranges may work, and are not run.

## Models and methods

Each class is tried as small random models, the rows of the test matrix, with which [families.md](families.md) is tested
too; every one of them can be calibrated. Tokens leave the text decoder, the text encoder, or the rows that
cross-attention reads. A column stands for the methods that work on the same models:

{groups}
Those of *inside* are tried at layer 1. A letter is the reason of a refusal, below the table; `…` stands for
`ForConditionalGeneration`.

{models}
Why not:

{reasons}
These are the errors that `prune` raises, word for word but for the name of the class. Types that are refused whatever
the method, with reasons: [families.md](families.md#refused).
"""


def page(rows: Sequence[Row]) -> str:
    """Return the page; `rows` are all rows of the matrix."""
    models, reasons = models_and_reasons(rows)
    heads = {name: ", ".join(f"`{method}`" for method in methods) for name, methods in GROUPS.items()}
    return HEAD.format(
        python=pythons(),
        versions=versions(),
        groups="".join(f"- *{name}*: {methods}\n" for name, methods in heads.items()),
        models=models,
        reasons="".join(f"- {letter}: {reason}\n" for reason, letter in reasons.items()),
    )


def versions() -> str:
    """Return the table of what the package needs, its range, and its version in each of `SETS`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = [_pinned(name) for name in SETS.values()]
    lines = [["Python", project["requires-python"], *[pythons()] * len(SETS)]]
    for line in project["dependencies"]:
        name, allowed = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", line).groups()
        lines.append([name, allowed, *(own.get(_plain(name), "not pinned") for own in pinned)])
    return markdown_table(["package", "allowed", *map(Markdown, SETS)], lines)


def pythons() -> str:
    """Return the version of Python that the sets are made for, as each of them says in its first lines."""
    (found,) = {_python(name) for name in SETS.values()}
    return found


def _python(name: str) -> str:
    return re.search(r"\(Python ([\d.]+)\)", (ROOT / name).read_text(encoding="utf-8"))[1]


def _pinned(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return {_plain(one): version for one, version in re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE)}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def models_and_reasons(rows: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """Return the table of model classes, and the letter of each reason why a method is refused."""
    reasons: dict[str, str] = {}
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        family = find_family(row.model())
        name = type(family.model).__name__
        cells = [name.replace("ForConditionalGeneration", "…"), family.reads]
        for methods in GROUPS.values():
            why = {method: refusal(row, method).replace(name, "the model") for method in methods}
            if len({not text for text in why.values()}) > 1:
                raise AssertionError(f"{row.name}: {why} differ, so they are no group of GROUPS.")
            text = why[methods[0]]
            cells.append(reasons.setdefault(text, ascii_lowercase[len(reasons)]) if text else "yes")
        lines.setdefault(tuple(cells), []).append(row.name)
    if missing := SCORERS.keys() - {method for methods in GROUPS.values() for method in methods}:
        raise AssertionError(f"{', '.join(sorted(missing))} is in no group of GROUPS: give it one.")
    table = [["; ".join(names), *cells] for cells, names in sorted(lines.items())]
    return markdown_table(["model", "class", "tokens leave", *GROUPS], table), reasons


@cache
def refusal(row: Row, scorer: str) -> str:
    """Return why a row's model cannot be pruned by a method, in the words of the error; "" if it can be."""
    family = find_family(row.model())
    guide = deepcopy(family.model) if scorer == "sgl" else None
    fields = {"scorer": scorer, "scorer_args": early(scorer), "keep": 0.5, **trained(scorer, family)}
    try:
        Pruner(family, PruningPolicy(**fields), guide=guide)
    except (PruningError, PolicyError) as error:
        return str(error)
    return ""


def trained(scorer: str, family: Family) -> dict[str, Any]:
    """Return the fields of a policy whose scorer is nothing without what a training gives it; {} for any other."""
    if scorer in COMPRESSORS:
        return compressor(scorer, on_grid=family.shows({Signal.PATCH_POSITION}))
    return learned() if scorer == "learned" else exiting() if scorer == "dyvte" else {}


if __name__ == "__main__":
    from tests.support.matrix import MORE, ROWS

    PAGE.write_text(page([*ROWS, *MORE]), encoding="utf-8")
