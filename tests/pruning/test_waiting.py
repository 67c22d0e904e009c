"""A pruned prefill waits for the GPU twice at most, and once more for each stage inside; a decoding step never does.

Once more if the question, a guard or a matrix rank decides which rule, or how many tokens, a sample gets.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from catp_lightning import PruningPolicy, prune
from catp_lightning.methods import regions
from catp_lightning.methods.guard import Guard
from catp_lightning.methods.summary import SUMMARY, Range, Ranges
from catp_lightning.pruning.pruner import applied
from catp_lightning.utils.on_cpu import on_cpu
from tests.support.families import BY_NAME
from tests.support.latest_families import LATEST
from tests.support.matrix import BEAMS, generate
from tests.support.newer_families import NEWER
from tests.support.picture_families import PICTURED
from tests.support.questions import counted
from tests.support.rows import Row
from tests.support.rules import OUTPUTS, RULES
from tests.support.waiting import waiting

PREFILL = 2  # what the caller gave is read, and which tokens stay
MORE = {row.name: row for row in (*NEWER, *PICTURED, *LATEST)}
FASTV = PruningPolicy("fastv", {"layer": 1}, keep=0.5)
BEFORE = {  # a row for each way in which families lay out their images, and a method for each kind of signal
    "Llava": ("fastervlm", "divprune", "stride", "random"),
    "LlavaNext": ("fastervlm",),
    "LlavaNextVideo": ("fastervlm",),
    "LlavaOnevision": ("fastervlm",),
    "Blip2-OPT": ("catp",),
    "Blip2-T5": ("catp",),
    "InstructBlip": ("catp",),
    "Mllama": ("trimmed-llama", "l2-norm", "stride"),
    "Mllama, last text that sees no image": ("l2-norm",),
    "Qwen2.5-VL": ("fastervlm",),
    "Qwen3-VL": ("fastervlm", "l2-norm"),
    "InternVL": ("fastervlm",),
    "Gemma3": ("fastervlm",),
    "SmolVLM": ("fastervlm",),
    "Mistral3": ("fastervlm",),
}
MORE_BEFORE = ("Fuyu", "Molmo2", "Granite-Docling", "Step-3.7", "Gemma4", "LFM2-VL", "VideoLLaMA3, compressed videos")
INSIDE = {"Llava": FASTV, "Qwen2.5-VL": FASTV, "Gemma3": FASTV, "Blip2-T5": FASTV}
CASES = [
    *((BY_NAME[name], PruningPolicy(of, keep=0.5), 0, f"{name}, {of}") for name, own in BEFORE.items() for of in own),
    *((MORE[name], PruningPolicy("l2-norm", keep=0.5), 0, name) for name in MORE_BEFORE if name in MORE),
    *((BY_NAME[name], policy, 1, f"{name}, inside") for name, policy in INSIDE.items()),
]
QUICK = {  # a model for each place where tokens leave, and a few layouts; rules have a test of their own
    *("Llava, fastervlm", "LlavaNext, fastervlm", "Blip2-OPT, catp", "Blip2-T5, catp", "Mllama, l2-norm", "Molmo2"),
    *("Qwen2.5-VL, fastervlm", "Mistral3, fastervlm", "SmolVLM, fastervlm", "Llava, inside", "Blip2-T5, inside"),
}


@pytest.mark.parametrize(
    ("row", "policy", "stages"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow) for *case, name in CASES],
)
def test_a_prefill_waits_twice_and_a_decoding_step_never(row: Row, policy: PruningPolicy, stages: int) -> None:
    model, inputs = row.model(), row.inputs()
    with prune(model, policy) as pruning:
        with waiting() as prefill:
            generate(row, model, inputs, 1)
        with waiting() as steps:
            generate(row, model, inputs, 3)
    assert pruning.keep is not None and pruning.prefills == 2
    assert prefill.lines, "nothing was counted"
    assert len(prefill.lines) <= PREFILL + stages, "\n".join(prefill.lines)
    assert len(steps.lines) <= PREFILL + stages, "\n".join(steps.lines)


@pytest.mark.parametrize("name", ["Llava", "Mllama"])
def test_beams_that_trade_places_do_not_wait(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs()
    with prune(model, PruningPolicy("l2-norm", keep=0.5)), waiting() as found:
        generate(row, model, inputs, 4, **BEAMS)
    assert len(found.lines) <= PREFILL, "\n".join(found.lines)


@pytest.fixture(autouse=True)
def unknown_regions() -> None:
    """What an earlier test has computed on the CPU is not known to be there."""
    regions._table.cache_clear()


def by_rule() -> list[Any]:
    """Every rule; by default each scorer and selector once, on the first model that tests try them on."""
    rules = [*RULES, *((name, counted(rule)) for name in ("Llava", "Mllama") for rule in OUTPUTS)]
    seen: set[tuple[Any, ...]] = set()
    found = []
    for name, rule in rules:
        kind = (rule["scorer"], rule.get("selector"), *sorted(rule.keys() & {"routes", "counts"}))
        marks = pytest.mark.slow if kind in seen else ()
        short = "-".join(
            map(str, (name, rule["scorer"], rule.get("selector", ""), *rule.keys() & {"routes", "counts"}))
        )
        found.append(pytest.param(name, rule, marks=marks, id=short))
        seen.add(kind)
    return found


@pytest.mark.parametrize(("name", "rule"), by_rule())
def test_whatever_the_rule_a_prefill_waits_no_more_often(name: str, rule: dict[str, Any]) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs()
    with prune(model, PruningPolicy(**{"keep": 0.4, **rule})) as pruning, waiting() as found:
        generate(row, model, inputs, 1)
    scorer = pruning.policy.build_scorer()
    inside = len(scorer.stages(pruning.last.per_layer.shape[1]))
    asks = inside if scorer.adaptive else int("routes" in rule or "counts" in rule)
    assert found.lines, "nothing was counted"
    assert len(found.lines) <= PREFILL + inside + asks, "\n".join(found.lines)


@pytest.mark.slow
@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("name", ["Llava", "Mllama"])
def test_a_guard_waits_once_more_to_see_which_images_are_far_outside(name: str, far: bool) -> None:
    row, policy = BY_NAME[name], PruningPolicy("l2-norm", keep=0.5)
    model, inputs = row.model(), row.inputs()
    wide = Range(mean=0.0, slope=0.0, std=1.0, low=-1e9, high=1e9)
    of = replace(wide, mean=1e3, low=900.0) if far else wide
    guard = Guard(Ranges(8.0, dict.fromkeys(SUMMARY, of)), PruningPolicy("divprune").method())
    with applied(model, policy, guard=guard) as pruner, waiting() as found:
        generate(row, model, inputs, 1)
    assert pruner.record.last is not None and pruner.record.last.summaries is not None
    assert bool(pruner.record.last.summaries.outside.any()) == far
    assert len(found.lines) <= PREFILL + 1, "\n".join(found.lines)


def test_what_waits_is_counted_and_what_is_on_the_cpu_is_not() -> None:
    given = torch.arange(6).view(2, 3)
    with waiting() as found:
        copies = on_cpu(given, given > 2)
        assert copies[1].sum() == 3  # on the CPU
    assert not found.lines, "a test's own call was counted"
    assert torch.equal(copies[0], given)
