"""Counts by question: each sample keeps as many tokens as its question says, whatever else is in the batch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.components import Question
from catp_lightning.methods.counts import MOST, Counted, Counts
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.selection import sample_of_images
from tests.support.families import BY_NAME
from tests.support.matrix import exact, generate, scale
from tests.support.questions import components, counted, learned, routed
from tests.support.rows import Row
from tests.support.rules import OUTPUTS

pytestmark = pytest.mark.usefixtures("no_grad")
COUNTED: list[tuple[str, dict[str, Any]]] = [
    *((name, counted(OUTPUTS[1])) for name in ("Llava", "Qwen2.5-VL", "Mllama", "Blip2-OPT", "Blip2-T5")),
    ("LlavaNext", counted({"scorer": "l2-norm", "selector_args": {"per": "crop"}})),
    ("LlavaNext", counted({"scorer": "l2-norm", "selector_args": {"per": "sample"}})),
    ("Llava", counted({"scorer": "visionzip"})),
    ("Qwen2.5-VL", counted(routed(*OUTPUTS))),
    ("Blip2-OPT", counted(learned(slots=8))),
]


def kept(row: Row, policy: PruningPolicy, rows: list[int]) -> Tensor:
    with prune(row.model(), policy) as pruning:
        row.model()(**row.oracle.forward_inputs(row.inputs(rows)))
    assert pruning.keep is not None
    return pruning.keep


def with_images(row: Row) -> list[int]:
    return [number for number, sample in enumerate(row.samples()) if sample.images]


@pytest.mark.parametrize(("name", "rule"), [one for one in COUNTED if one[1]["scorer"] != "visionzip"])
def test_dropping_different_numbers_of_tokens_equals_masking(name: str, rule: dict[str, Any]) -> None:
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


@pytest.mark.parametrize(("name", "rule"), COUNTED)
def test_what_a_sample_keeps_does_not_depend_on_its_batch(name: str, rule: dict[str, Any]) -> None:
    row, policy = BY_NAME[name], PruningPolicy(keep=0.4, **rule)
    rows = with_images(row)
    together, backwards = kept(row, policy, rows), kept(row, policy, rows[::-1])
    assert torch.equal(together, backwards.flip(0))
    for place, number in enumerate(rows):
        alone = kept(row, policy, [number])
        assert torch.equal(together[place, : alone.shape[1]], alone[0]) and not together[place, alone.shape[1] :].any()


@pytest.mark.parametrize("keep", [0.4, 3])
@pytest.mark.parametrize("rule", [OUTPUTS[0], routed(*OUTPUTS)], ids=["plain", "routed"])
@pytest.mark.parametrize("name", ["Llava", "Qwen2.5-VL", "Blip2-OPT"])
def test_each_image_keeps_the_multiple_of_the_budget_that_its_question_gets(
    name: str, rule: dict[str, Any], keep: int | float
) -> None:
    row, told = BY_NAME[name], []
    policy, rows = PruningPolicy(keep=keep, **counted(rule, weight=1.0)), with_images(row)
    factors = Counts.factors

    def watched(self: Counts, seen: Observation) -> Tensor:
        told.append(seen)
        return factors(self, seen)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Counts, "factors", watched)
        kept_of_samples = kept(row, policy, rows).sum(1)
    (seen,), question = told, components()
    basis, offset = torch.tensor(question.rows()).double(), torch.tensor(question.offset).double()
    expected = torch.zeros_like(kept_of_samples)
    for image, sample in enumerate(sample_of_images(seen.valid, row.oracle.tokens(row.inputs(rows))).tolist()):
        one, other = (basis @ seen[Signal.QUESTION][image].double() + offset).tolist()
        multiple = min(MOST, max(1 / MOST, math.exp(one + other + 0.1)))
        tokens = int(seen.valid[image].sum())
        expected[sample] += min(tokens, max(1, math.floor(keep_count(keep, tokens) * multiple + 0.5)))
    assert torch.equal(kept_of_samples, expected)
    plain = kept(row, PruningPolicy(keep=keep, **rule), rows)
    assert not torch.equal(kept_of_samples, plain.sum(1))


def test_multiples_are_never_beyond_what_was_measured() -> None:
    question = Question.of(torch.eye(1, 2).numpy(), torch.zeros(1).numpy())
    seen = Observation(
        torch.ones(3, 4, dtype=torch.bool), {}, {Signal.QUESTION: torch.tensor([[-99.0, 0], [0, 9], [99, 0]])}
    )
    torch.testing.assert_close(Counts(question, (1.0, 0.0)).factors(seen), torch.tensor([1 / MOST, 1.0, MOST]))
    with pytest.raises(ValueError, match="weights are 1 numbers; there are 2"):
        Counts(question, (1.0,))


def test_counts_are_saved_and_loaded(tmp_path: Path) -> None:
    policy = PruningPolicy(keep=0.4, **counted(routed(*OUTPUTS)))
    loaded = PruningPolicy.load(policy.save(tmp_path / "policy.json"))
    assert loaded == policy and loaded.method() == policy.method() and isinstance(loaded.method(), Counted)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({}, "counts lacks question"),
        ({"weights": [1.0]}, "counts lacks question"),
        ({**counted({})["counts"], "weights": [1.0]}, "counts: weights are 1 numbers; there are 3"),
        ({**counted({})["counts"], "weights": [1.0, "a", 0.0]}, "weights of counts is 'a'"),
        ({**counted({})["counts"], "more": 1}, "counts has no argument 'more'"),
        (3, "counts"),
    ],
)
def test_damaged_counts_are_refused_by_what_is_wrong(counts: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        PruningPolicy(counts=counts)


@pytest.mark.parametrize("scorer", ["fastv", "pyramiddrop", "visual-exit"])
def test_counts_are_refused_where_tokens_leave_inside_the_decoder(scorer: str) -> None:
    with pytest.raises(PolicyError, match=f"counts do not go with scorer '{scorer}'.*Leave counts out"):
        PruningPolicy(**counted({"scorer": scorer}))
