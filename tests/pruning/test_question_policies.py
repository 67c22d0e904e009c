"""Policies that know the question: what stays is what each rule keeps, and dropping it equals masking it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.models import find_family
from catp_lightning.policy.building import build_routed
from tests.support.families import BY_NAME
from tests.support.matrix import exact, generate, scale
from tests.support.questions import by_question, components, routed
from tests.support.rows import Row
from tests.support.rules import OUTPUTS, RULES

pytestmark = pytest.mark.usefixtures("no_grad")
ASKING = [(name, rule) for name, rule in RULES if "routes" in rule or "question" in rule.get("scorer_args", {})]


def with_images(row: Row) -> list[int]:
    return [number for number, sample in enumerate(row.samples()) if sample.images]


@pytest.mark.parametrize(("name", "rule"), ASKING)
def test_dropping_by_the_question_equals_masking(name: str, rule: dict[str, Any]) -> None:
    row, policy = BY_NAME[name], PruningPolicy(keep=0.4, **rule)
    model, inputs = row.model(), row.inputs()
    forward = row.oracle.forward_inputs(inputs)
    full = model(**forward).logits
    with prune(model, policy) as pruning:
        prefill = model(**forward).logits
        tokens, steps = generate(row, model, inputs)
    keep = pruning.keep
    assert keep is not None and not torch.equal(keep, row.oracle.tokens(inputs))
    with row.oracle.masked(model, inputs, keep):
        masked = model(**forward).logits
        masked_tokens, masked_steps = generate(row, model, inputs)
    compared, atol = row.oracle.compared(inputs, keep), row.tolerance() * scale(full)
    exact(prefill[compared], masked[compared], atol=atol)
    exact(steps, masked_steps, atol=atol)
    assert torch.equal(tokens, masked_tokens)


def kept(row: Row, rule: dict[str, Any], rows: list[int], keep: float | int = 0.4) -> tuple[Tensor, Tensor]:
    model = row.model()
    with prune(model, PruningPolicy(keep=keep, **rule)) as pruning:
        model(**row.oracle.forward_inputs(row.inputs(rows)))
    assert pruning.keep is not None and pruning.scores is not None
    return pruning.keep, pruning.scores


@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "Qwen2.5-VL", "Mllama", "Blip2-OPT", "Blip2-T5"])
def test_each_sample_keeps_what_the_rule_that_its_question_takes_keeps_alone(name: str) -> None:
    """Samples of several images, of one, and of none."""
    row = BY_NAME[name]
    everyone = list(range(len(row.samples()))) if name != "Mllama" else with_images(row)
    alone, met = [kept(row, dict(rule), everyone) for rule in OUTPUTS], set()
    own = [number for number in everyone if row.samples()[number].images]
    for seed in range(6):
        keep, scores = kept(row, routed(*OUTPUTS, seed=seed), everyone)
        for sample in everyone:
            there = [number for number, (other, _) in enumerate(alone) if torch.equal(other[sample], keep[sample])]
            assert there, "one of the rules"
            if sample in own and len(there) == 1:
                met.add((sample, there[0]))
                expected = alone[there[0]][1][sample]
                torch.testing.assert_close(scores[sample], expected.to(scores.dtype), rtol=1e-6, atol=1e-6)
    assert len({rule for _, rule in met}) == 3 and len({sample for sample, _ in met}) > 1
    mixed, _ = kept(row, routed(*OUTPUTS, seed=3), everyone)
    backwards, _ = kept(row, routed(*OUTPUTS, seed=3), everyone[::-1])
    assert torch.equal(mixed, backwards.flip(0)), "the order of a batch does not matter"


def test_a_rule_that_cannot_take_anothers_place_is_refused() -> None:
    model = BY_NAME["Llava"].model()
    late, merging = {"scorer": "fastv"}, {"scorer": "visionzip"}
    for rules in ((OUTPUTS[0], late), (late, OUTPUTS[0]), (OUTPUTS[0], merging), (merging, OUTPUTS[0])):
        name = next(rule["scorer"] for rule in rules if rule in (late, merging))
        with pytest.raises(PruningError, match=f"(?s){name}.*routes"), prune(model, PruningPolicy(**routed(*rules))):
            pass
    fastv = PruningPolicy("fastv", {"layer": 2, **by_question([1], 4)})
    with pytest.raises(PolicyError, match="weights cannot change with the question"), prune(model, fastv):
        pass


@pytest.mark.parametrize(
    "rule",
    [
        routed(*OUTPUTS, width=31),
        {"scorer": "fastervlm", "scorer_args": by_question([1], 4, width=31)},
        {"scorer": "fastervlm", "scorer_args": {**by_question([1], 3), "head_weights": None}},
        {"scorer": "fastervlm", "scorer_args": by_question([1], 4, 5)},
        {"scorer": "fastervlm", "scorer_args": {**by_question([1, 2], 4), "layers": [1], "head_weights": None}},
    ],
    ids=["router of other words", "weights of other words", "other heads", "other slots", "other layers"],
)
def test_what_was_fitted_to_another_model_says_so(rule: dict[str, Any]) -> None:
    row = BY_NAME["Llava"]
    says = "31 dimensions.*give.* 32|3 heads|5 slots|2 layers"
    with pytest.raises(ValueError, match=says), prune(row.model(), PruningPolicy(keep=3, **rule)):
        row.model()(**row.inputs([0]))


def test_routing_and_full_budget_keep_everything() -> None:
    row = BY_NAME["Llava"]
    with prune(row.model(), PruningPolicy(keep=1.0, **routed(*OUTPUTS))) as pruning:
        row.model()(**row.inputs([0, 2]))
    assert pruning.keep is not None and pruning.keep.all()


def test_a_batch_without_images_takes_no_rule() -> None:
    for name in ("Llava", "Mllama"):
        row = BY_NAME[name]
        with prune(row.model(), PruningPolicy(keep=0.5, **routed(*OUTPUTS))) as pruning:
            row.model()(input_ids=torch.full((1, 6), 5), attention_mask=torch.ones(1, 6, dtype=torch.long))
        assert pruning.keep is not None and not pruning.keep.any()


def test_the_components_of_a_model_have_the_width_of_its_words() -> None:
    for name in ("Llava", "Mllama", "Blip2-OPT", "Blip2-T5", "Qwen2.5-VL"):
        assert find_family(BY_NAME[name].model()).text_width == 32


def test_no_question_is_read_where_the_rule_does_not_ask() -> None:
    routes = routed(*OUTPUTS)["routes"]
    plain = PruningPolicy(**OUTPUTS[0])
    assert "QUESTION" not in {getattr(signal, "name", "") for signal in plain.method().needs}
    both = build_routed(plain.method(), replace(PruningPolicy(**routed(*OUTPUTS))).routes)
    assert {getattr(signal, "name", "") for signal in both.needs} >= {"QUESTION", "IMAGE_FEATURES"}
    assert len(both.rules) == len(routes["rules"]) + 1 and components().count == 2
