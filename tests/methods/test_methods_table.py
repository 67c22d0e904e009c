"""docs/methods.md says which methods run on which models; so does the code, and every refusal has its reason."""

from copy import deepcopy
from typing import Any

import pytest

from catp_lightning import PolicyError, PruningError, PruningPolicy
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.models import Family, find_family
from catp_lightning.pruning.pruner import Pruner
from tests.support.compressors import COMPRESSORS, compressor, exiting
from tests.support.families import BY_NAME
from tests.support.paths import ROOT
from tests.support.questions import learned
from tests.support.rows import Row
from tests.support.rules import RULES, early

PAGE = ROOT / "docs" / "methods.md"
COLUMNS = {
    "BLIP-2, InstructBLIP": ("Blip2-OPT", "InstructBlip"),
    "the same with T5": ("Blip2-T5",),
    "LLaVA-1.5, VipLLaVA": ("Llava", "VipLlava"),
    "LLaVA-NeXT, OneVision, Video-LLaVA": ("LlavaNext", "LlavaNextVideo", "LlavaOnevision", "VideoLlava"),
    "Llama-3.2-Vision": ("Mllama",),
    "Qwen-VL": ("Qwen2-VL", "Qwen2.5-VL"),
    "InternVL, Mistral 3, Pixtral": ("InternVL", "Mistral3", "Pixtral"),
    "SmolVLM, Idefics 3, Gemma 3, PaliGemma": ("SmolVLM", "Idefics3", "Gemma3", "PaliGemma", "PaliGemma2"),
}
REASONS: list[str] = []


def runs(row: Row, scorer: str) -> bool:
    family = find_family(row.model())
    guide = deepcopy(family.model) if scorer == "sgl" else None
    fields = {"scorer": scorer, "scorer_args": early(scorer), "keep": 0.5, **trained(scorer, family)}
    try:
        Pruner(family, PruningPolicy(**fields), guide=guide)
    except (PruningError, PolicyError) as error:
        REASONS.append(str(error))
        return False
    return True


def trained(scorer: str, family: Family) -> dict[str, Any]:
    """Return the fields of a policy whose scorer is nothing without what a training gives it; {} for any other."""
    if scorer in COMPRESSORS:
        return compressor(scorer, on_grid=family.shows({Signal.PATCH_POSITION}))
    return learned() if scorer == "learned" else exiting() if scorer == "dyvte" else {}


def computed() -> list[str]:
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for scorer in [name for name in SCORERS if name != "random"] + ["random"]:
        cells = []
        for names in COLUMNS.values():
            found = {runs(BY_NAME[name], scorer) for name in names}
            assert len(found) == 1, f"{scorer}: {names} differ"
            cells.append("yes" if found == {True} else "-")
        lines.append(f"| `{scorer}` | {' | '.join(cells)} |")
    return lines


@pytest.mark.filterwarnings("ignore")
def test_the_table_of_methods_and_families_is_what_the_code_does() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for line in computed():
        assert line in page, f"missing in docs/methods.md: {line}"
    assert REASONS and min(map(len, REASONS)) > 60, "a reason, and what to do"


def test_every_method_is_in_the_one_list_that_drives_their_tests() -> None:
    guided = {name for name, scorer in SCORERS.items() if Signal.GUIDE_ATTENTION in scorer().needs}
    assert {rule["scorer"] for _, rule in RULES} == SCORERS.keys() - guided, "guided ones need a second model"
