"""Models and Trainers in several threads: each finds what it would have found alone."""

import itertools
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn import linear_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from catp_lightning import PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.calibration.fit import heads
from tests.support.calibrations import calibrate, data
from tests.support.families import BY_NAME
from tests.support.footprints import everything_of
from tests.support.guides import RULE, small_llava
from tests.support.models import random_blip2
from tests.support.modules import Answering, Generating, by_hand, same, unpruned
from tests.support.policies import HALF
from tests.support.processes import finished
from tests.support.threads import by_policy, together
from tests.support.trainers import trainer


def worker(row: str, attention: str, policy: PruningPolicy, times: int) -> tuple[PreTrainedModel, Callable[[], Any]]:
    """Answers one prompt again and again, pruned and not, with gradients and without."""
    own = replace(BY_NAME[row], name=f"{row} {attention} {policy.scorer} of a thread")
    model, given = own.model(torch.float32, attention), own.inputs(dtype=torch.float32)
    forward, texts = own.oracle.forward_inputs(given), {**given}
    model(**forward)  # transformers' own first call

    def run() -> list[Any]:
        found: list[Any] = []
        for number in range(times):
            with torch.set_grad_enabled(number % 2 == 0):
                with prune(model, policy) as pruning:
                    logits = model(**forward).logits
                    text = model.generate(**texts, max_new_tokens=2, do_sample=False)
                found.append((logits.detach(), text, pruning.keep, logits.requires_grad))
                found.append((model(**forward).logits.detach(),))
        return found

    return model, run


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("times", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_four_models_in_four_threads_answer_as_they_do_alone(times: int) -> None:
    kinds = [
        ("Blip2-OPT", "sdpa", PruningPolicy(scorer="catp", keep=0.5)),
        ("Blip2-OPT", "eager", PruningPolicy(scorer="catp", keep=0.25)),
        ("Llava", "sdpa", PruningPolicy(scorer="fastv", keep=0.5)),
        ("Mllama", "eager", PruningPolicy(scorer="trimmed-llama", keep=0.5)),
    ]
    models, runs = zip(*(worker(*kind, times) for kind in kinds), strict=True)
    alone, before = [run() for run in runs], [everything_of(model) for model in models]
    for found, expected in zip(together(*runs), alone, strict=True):
        assert not isinstance(found, Exception), found
        assert equal(found, expected)
    assert [everything_of(model) for model in models] == before


def test_one_policy_and_one_config_in_two_threads() -> None:
    config = BY_NAME["Llava"].make().config
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    policy = PruningPolicy(scorer="fastervlm", keep=0.5)
    inputs = BY_NAME["Llava"].inputs([0], dtype=torch.float32)
    models = [LlavaForConditionalGeneration(config).eval() for _ in range(2)]
    expected = [by_policy(model, inputs, policy) for model in models]
    before = [everything_of(model) for model in models]

    def answer(model: PreTrainedModel) -> Callable[[], list[Tensor]]:
        return lambda: [by_policy(model, inputs, policy) for _ in range(25)]

    for found, logits in zip(together(*map(answer, models)), expected, strict=True):
        assert not isinstance(found, Exception), found
        assert all(torch.equal(each, logits) for each in found)
    assert [everything_of(model) for model in models] == before


def test_of_threads_that_prune_one_model_at_the_same_time_one_does_and_the_others_are_refused() -> None:
    model, inputs = random_blip2()
    expected, before = by_policy(model, inputs, HALF), everything_of(model)
    for _ in range(10):
        left = threading.Barrier(4)

        def run(left: threading.Barrier = left) -> Tensor:
            try:
                with torch.no_grad(), prune(model, HALF):
                    left.wait(60)  # the others have been refused
                    return model(**inputs).logits
            except PruningError:
                left.wait(60)
                raise

        found = together(run, run, run, run)
        refused = [each for each in found if isinstance(each, PruningError)]
        assert len(refused) == 3 and all("being pruned already" in str(error) for error in refused), found
        assert torch.equal(next(each for each in found if isinstance(each, Tensor)), expected)
        assert everything_of(model) == before


def test_a_guide_that_two_threads_ask_at_once_answers_right_or_is_refused() -> None:
    row, small = BY_NAME["Llava"], small_llava().eval()
    models = [replace(row, name=f"guided {number}").model(torch.float32) for number in range(2)]
    inputs = [row.inputs([number], dtype=torch.float32) for number in range(2)]
    pairs = list(zip(models, inputs, strict=True))
    expected = [by_policy(model, own, RULE, guide=small) for model, own in pairs]

    def ask(model: PreTrainedModel, own: dict[str, Tensor], right: Tensor) -> Callable[[], list[bool]]:
        def run() -> list[bool]:
            answered = []
            for _ in range(6):
                try:
                    answered.append(torch.equal(by_policy(model, own, RULE, guide=small), right))
                except PruningError as error:
                    answered.append("asked as a guide" in str(error))
            return answered

        return run

    found = together(*(ask(*pair, right) for pair, right in zip(pairs, expected, strict=True)))
    assert all(isinstance(each, list) and all(each) for each in found), found
    assert not any(module.training for module in small.modules())


REGISTERING = """
import sys, threading, time, torch
from transformers import AttentionInterface, AttentionMaskInterface
from catp_lightning import PruningPolicy, prune
from tests.support.families import ROWS

slow, plain = float(sys.argv[1]), AttentionMaskInterface.register

def register(name, value):  # a thread that loses the processor here leaves one name without the other
    time.sleep(slow)
    plain(name, value)

AttentionMaskInterface.register = register
torch.set_num_threads(1)
row = next(row for row in ROWS if row.name == "Llava")
policy, inputs = PruningPolicy(scorer="fastv", keep=0.5), row.inputs([0, 1], dtype=torch.float32)
models = [row.make().eval() for _ in range(2)]
for model in models:
    model(**inputs)
    model.load_state_dict(models[0].state_dict())
ready, found = threading.Barrier(2), [None, None]

def run(number):
    ready.wait(60)
    time.sleep(0.05 * number)  # the second comes while the first is registering
    with torch.no_grad(), prune(models[number], policy):
        found[number] = models[number](**inputs).logits

threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
with torch.no_grad(), prune(models[0], policy):
    expected = models[0](**inputs).logits
assert all(torch.equal(each, expected) for each in found), "masks were made for another implementation"
names = [sorted(name for name in kind().valid_keys() if name.startswith("catp_")) for kind in
         (AttentionInterface, AttentionMaskInterface)]
assert names == [["catp_sdpa"]] * 2, names
"""


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["0.2", "0"])
def test_two_threads_that_prune_first_at_the_same_time_find_both_names_of_observed_attention(slow: str) -> None:
    for _ in range(1 if float(slow) else 5):
        finished("-c", REGISTERING, slow)


def test_trainers_in_two_threads_predict_as_they_do_alone() -> None:
    modules = [Answering(), Answering(random_blip2(seed=1))]
    expected = [by_hand(module) for module in modules]
    plain = [unpruned(module) for module in modules]

    def predict(module: Answering) -> Callable[[], Any]:
        return lambda: trainer(TokenPruning(HALF)).predict(module, module.loader())

    for found, right in zip(together(*map(predict, modules)), expected, strict=True):
        assert not isinstance(found, Exception), found
        assert same(found, right)
    assert all(same(unpruned(module), full) for module, full in zip(modules, plain, strict=True))


def test_one_callback_in_two_threads_is_refused_in_one_or_serves_both() -> None:
    modules, pruning = [Answering(), Answering(random_blip2(seed=1))], TokenPruning(HALF)
    expected = [by_hand(module) for module in modules]

    def predict(module: Answering) -> Callable[[], Any]:
        return lambda: trainer(pruning).predict(module, module.loader())

    found = together(*map(predict, modules))
    for one, right in zip(found, expected, strict=True):
        assert isinstance(one, PruningError) or same(one, right), one
    assert not all(isinstance(one, Exception) for one in found)


@pytest.mark.slow
def test_calibrations_in_two_threads_find_what_they_find_alone(tmp_path: Path) -> None:
    batches = data(24, 12)

    def calibration(place: str) -> Callable[[], list[dict[str, Any]]]:
        module = Generating()

        def run() -> list[dict[str, Any]]:
            found = calibrate(module, batches, tmp_path / place)
            return [policy.to_dict() for policy in found.policies]

        return run

    alone, filters = calibration("alone.json")(), list(warnings.filters)
    for found in together(calibration("one.json"), calibration("two.json")):
        assert found == alone
    assert list(warnings.filters) == filters, "no thread has left those of another behind"


def test_fits_of_heads_in_two_threads_leave_the_warning_filters_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the process's: who restores them last would otherwise restore what the other had set for a moment."""
    plain, begun = linear_model.lars_path_gram, itertools.count(1)

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2 * next(begun))  # the first to begin is the first to end
        return plain(*args, **kwargs)

    columns = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)).double().numpy()
    gram, moment = columns.T @ columns, columns.T @ columns[:, 0]
    fit = partial(heads._path, gram, moment, 64, 0, float(abs(moment).max()) / 64)
    filters, expected = list(warnings.filters), fit()
    monkeypatch.setattr(linear_model, "lars_path_gram", slowly)
    assert all((found == expected).all() for found in together(fit, fit))
    assert list(warnings.filters) == filters
