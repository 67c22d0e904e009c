"""docs/methods.md says which methods run on which models; so does the code, and every refusal has its reason."""

import pytest

from catp_lightning.methods.observation import Signal
from catp_lightning.methods.scorers import SCORERS
from tests.support.compatibility import refusal
from tests.support.families import BY_NAME
from tests.support.paths import ROOT
from tests.support.rules import RULES

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


def computed() -> list[str]:
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for scorer in [name for name in SCORERS if name != "random"] + ["random"]:
        cells = []
        for names in COLUMNS.values():
            found = [refusal(BY_NAME[name], scorer) for name in names]
            REASONS.extend(filter(None, found))
            assert len(set(map(bool, found))) == 1, f"{scorer}: {names} differ"
            cells.append("-" if found[0] else "yes")
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
