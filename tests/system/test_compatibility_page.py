"""docs/compatibility.md is what the code and the constraints say: versions, and which methods work on which models."""

import re
from typing import Any

import pytest
import transformers as hf

from tests.support import compatibility
from tests.support.compatibility import PAGE, SETS, models_and_reasons, page, versions
from tests.support.families import BY_NAME
from tests.support.matrix import MORE, ROWS
from tests.support.paths import ROOT

NEWEST = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
newest = pytest.mark.skipif(hf.__version__ != NEWEST, reason=f"the page is of transformers {NEWEST}")
quiet = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@newest
@quiet
def test_the_page_is_what_its_program_writes() -> None:
    again = "docs/compatibility.md is not what the code says: python -m tests.support.compatibility"
    assert PAGE.read_text(encoding="utf-8") == page([*ROWS, *MORE]), again


def test_versions_are_those_of_the_project_and_its_constraints() -> None:
    assert versions() in PAGE.read_text(encoding="utf-8")
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in versions().splitlines()]
    by_name = {name: pinned for name, _, *pinned in found}
    assert {"Python", "transformers", "lightning", "wandb"} < by_name.keys()
    for place, file in enumerate(SETS.values()):
        assert f"torch=={by_name['torch'][place]}\n" in (ROOT / file).read_text(encoding="utf-8")


@quiet
def test_methods_that_do_not_run_on_the_same_models_are_no_group_and_none_is_left_out(monkeypatch: Any) -> None:
    monkeypatch.setattr(compatibility, "GROUPS", {"two": ("catp", "fastervlm")})
    with pytest.raises(AssertionError, match=r"Llava: .*'catp'.* differ"):
        models_and_reasons([BY_NAME["Llava"]])
    monkeypatch.setattr(compatibility, "GROUPS", {"one": ("catp",)})
    with pytest.raises(AssertionError, match=r"fastv.* is in no group"):
        models_and_reasons([BY_NAME["Llava"]])
