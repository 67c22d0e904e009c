"""Policies that know the question: what stays is what each rule keeps, and dropping it equals masking it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers import Learned
from catp_lightning.policy.building import build_routed
from tests.support.families import BY_NAME
from tests.support.matrix import exact, generate, scale
from tests.support.questions import components, learned, routed
from tests.support.rows import Row
from tests.support.rules import OUTPUTS, RULES

pytestmark = pytest.mark.usefixtures("no_grad")
ASKING = [(name, rule) for name, rule in RULES if "routes" in rule or rule["scorer"] == "learned"]


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "rule",
    [
        routed(*OUTPUTS, width=31),
        learned(width=31),
        learned(features=31),
        learned(slots=5),
    ],
    ids=["router of other words", "network of other words", "network of other tokens", "network of other slots"],
)
def test_what_was_fitted_to_another_model_says_so(rule: dict[str, Any]) -> None:
    row = BY_NAME["Llava"]
    says = "31 dimensions.*give.* 32|5 slots.* 9 tokens"
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


def test_a_network_that_was_never_trained_is_refused_before_anything_runs() -> None:
    model, untrained = BY_NAME["Llava"].model(), PruningPolicy("learned")
    routes = PruningPolicy(**routed(OUTPUTS[0], {"scorer": "learned"}))
    for policy in (untrained, routes):
        with pytest.raises(PruningError, match=r"'learned' has no network.*calibration"), prune(model, policy):
            pass
    with prune(model, untrained.with_keep(1.0)) as pruning:
        model(**BY_NAME["Llava"].inputs([0]))
    assert pruning.keep is not None and pruning.keep.all(), "nothing is to be scored"


@pytest.mark.parametrize("name", ["Llava", "Mllama"])
def test_a_token_is_worth_what_a_loop_over_the_network_gives(name: str) -> None:
    row, rule = BY_NAME[name], learned()
    scorer, told = PruningPolicy(keep=0.4, **rule).build_scorer(), []
    assert isinstance(scorer, Learned) and scorer.network is not None
    score = type(scorer).score

    def watched(self: Learned, seen: Observation) -> Tensor:
        told.append((seen, score(self, seen)))
        return told[-1][1]

    with pytest.MonkeyPatch.context() as patched, prune(row.model(), PruningPolicy(keep=0.4, **rule)):
        patched.setattr(Learned, "score", watched)
        row.model()(**row.oracle.forward_inputs(row.inputs()))
    ((seen, scores),) = told
    network = scorer.network
    one, other = seen[Signal.IMAGE_FEATURES].double(), seen[Signal.QUESTION].double()
    x = one @ torch.tensor(network.features.rows()).double().T + torch.tensor(network.features.offset).double()
    q = other @ torch.tensor(network.question.rows()).double().T + torch.tensor(network.question.offset).double()
    w = {key: value.double() for key, value in network._decoded.items()}
    for image in range(len(x)):
        for token in range(x.shape[1]):
            first = (w["features"] @ x[image, token] + w["question"] @ q[image] + w["place"][0]).clamp(min=0)
            worth = (w["hidden"] @ first + w["bias"]).clamp(min=0) @ w["out"] + w["slots"][0]
            assert float(scores[image, token]) == pytest.approx(float(worth), rel=1e-4, abs=1e-4)
    assert scores[seen.valid].std() > 0.1


def test_no_question_is_read_where_the_rule_does_not_ask() -> None:
    routes = routed(*OUTPUTS)["routes"]
    plain = PruningPolicy(**OUTPUTS[0])
    assert "QUESTION" not in {getattr(signal, "name", "") for signal in plain.method().needs}
    both = build_routed(plain.method(), replace(PruningPolicy(**routed(*OUTPUTS))).routes)
    assert {getattr(signal, "name", "") for signal in both.needs} >= {"QUESTION", "IMAGE_FEATURES"}
    assert len(both.rules) == len(routes["rules"]) + 1 and components().count == 2
