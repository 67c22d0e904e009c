"""Trainers, models and threads beside each other and inside each other: each finds what it would have found alone."""

import copy
import itertools
import os
import stat
import sys
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
from lightning.pytorch import Callback
from sklearn import linear_model
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from catp_lightning import CrossAttentionCalibration, PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.calibration.fit import heads
from catp_lightning.utils.files import write_text
from tests.support.calibrations import calibrate, data
from tests.support.families import BY_NAME
from tests.support.footprints import everything_of
from tests.support.guides import RULE, small_llava
from tests.support.models import random_blip2
from tests.support.modules import Answering, Generating, by_hand, same, unpruned
from tests.support.policies import HALF, QUARTER
from tests.support.processes import finished
from tests.support.trainers import loading, trainer


class Inside(Callback):
    """Runs something once inside a loop of another trainer; what it raises is kept."""

    def __init__(self, run: Callable[[], Any], hook: str = "on_validation_batch_end") -> None:
        self.found: list[Any] = []
        setattr(self, hook, lambda *args, **kwargs: self._once(run))

    def _once(self, run: Callable[[], Any]) -> None:
        if not self.found:
            try:
                self.found.append(run())
            except PruningError as error:
                self.found.append(error)


# --- Several trainers


def test_one_callback_serves_two_trainers_one_after_the_other_and_by_turns() -> None:
    one, two, callback = Answering(), Answering(random_blip2(seed=1)), TokenPruning(HALF)
    before = [everything_of(module.model) for module in (one, two)]
    expected = [by_hand(one), by_hand(two)]
    assert not same(*expected)
    first, second = trainer(callback), trainer(callback)
    for _ in range(2):
        assert same(first.predict(one, one.loader()), expected[0])
        assert same(second.predict(two, two.loader()), expected[1])
    assert [everything_of(module.model) for module in (one, two)] == before


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_a_prediction_inside_anothers_validation_leaves_both_what_they_are_alone(hook: str) -> None:
    outer, inner = Answering(), Answering(random_blip2(seed=1))
    expected = by_hand(outer), by_hand(inner, QUARTER)
    inside = Inside(lambda: trainer(TokenPruning(QUARTER)).predict(inner, inner.loader()), hook)
    pruning = TokenPruning(HALF)
    trainer(pruning, inside).validate(outer, outer.loader())
    assert same(outer.seen, expected[0]) and same(inside.found[0], expected[1])
    assert pruning.figures["catp/keep_share"] == 0.5


def test_pruning_the_same_model_inside_is_refused_and_the_outer_loop_goes_on() -> None:
    module = Answering()
    before, expected = everything_of(module.model), by_hand(module)
    sharing = Answering((module.model, module.inputs))
    inside = Inside(lambda: trainer(TokenPruning(QUARTER)).predict(sharing, module.loader()))
    pruning = TokenPruning(HALF)
    trainer(pruning, inside).validate(module, module.loader())
    assert isinstance(inside.found[0], PruningError) and "being pruned already" in str(inside.found[0])
    assert same(module.seen, expected) and pruning.figures["catp/tokens_kept"] == 4
    assert everything_of(module.model) == before


@pytest.mark.parametrize("stages", [("validate", "test", "predict"), ("validate",)])
def test_one_callback_in_a_trainer_inside_anothers_loop_is_refused_and_the_outer_loop_goes_on(stages: Any) -> None:
    """Its end would be the outer one's end: the rest of that loop would run unpruned, without a word."""
    outer, inner, pruning = Answering(), Answering(random_blip2(seed=1)), TokenPruning(HALF, stages=stages)
    before, expected = [everything_of(module.model) for module in (outer, inner)], by_hand(outer)
    inside = Inside(lambda: trainer(pruning).predict(inner, inner.loader()))
    trainer(pruning, inside).validate(outer, outer.loader())
    assert isinstance(inside.found[0], PruningError)
    assert "This TokenPruning is at work in another Trainer" in str(inside.found[0])
    assert same(outer.seen, expected) and pruning.figures["catp/keep_share"] == 0.5
    assert [everything_of(module.model) for module in (outer, inner)] == before
    assert same(trainer(pruning).validate(inner, inner.loader()) and inner.seen, by_hand(inner)), "then it serves"


def test_a_model_that_is_calibrated_cannot_be_pruned_meanwhile_and_the_policy_is_that_of_a_calibration_alone(
    tmp_path: Path,
) -> None:
    """Calibration would take pruned answers for those of the whole model."""
    batches = data(24, 12)
    alone = calibrate(Generating(), batches, tmp_path / "alone.json").policies
    module, other = Generating(), Answering()
    before, loader = everything_of(module.net), loading(batches)

    def meddle() -> list[str]:
        found = []
        for run in (
            lambda: prune(module, HALF).__enter__(),
            lambda: trainer(CrossAttentionCalibration(tmp_path / "inner.json")).predict(Generating(module.net), loader),
        ):
            with pytest.raises(PruningError) as raised:
                run()
            found.append(str(raised.value))
        trainer(TokenPruning(HALF)).validate(other, other.loader())  # another model may be
        return found

    inside = Inside(meddle, "on_predict_batch_start")
    calibration = CrossAttentionCalibration(tmp_path / "p.json")
    trainer(calibration, inside).predict(module, loader)
    assert all("being pruned already, or calibrated" in said for said in inside.found[0])
    assert [policy.to_dict() for policy in calibration.policies] == [policy.to_dict() for policy in alone]
    assert same(other.seen, by_hand(other)) and everything_of(module.net) == before


def test_a_calibration_that_fails_while_entering_is_as_if_it_had_not_begun(tmp_path: Path) -> None:
    module, batches = Generating(), data(24, 12)
    before, calibration = everything_of(module.net), CrossAttentionCalibration(tmp_path / "p.json")
    loader = loading(batches)
    with prune(module, HALF), pytest.raises(PruningError, match="being pruned already"):
        trainer(calibration).predict(module, loader)
    assert calibration._run is None and everything_of(module.net) == before
    trainer(calibration).predict(module, loader)
    assert len(calibration.policies) == 1


# --- Several models, copies, guides


def test_models_made_from_one_config_are_left_in_any_order() -> None:
    """They share the object that says how they attend."""
    config = BY_NAME["Llava"].make().config
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    one, two = LlavaForConditionalGeneration(config).eval(), LlavaForConditionalGeneration(config).eval()
    inputs = BY_NAME["Llava"].inputs([0], dtype=torch.float32)
    policy = PruningPolicy(scorer="fastervlm", keep=0.5)
    expected = []
    for model in (one, two):
        with torch.no_grad(), prune(model, policy):
            expected.append(model(**inputs).logits)
    before = [everything_of(model) for model in (one, two)]
    with torch.no_grad():
        first, second = prune(one, policy), prune(two, policy)
        first.__enter__()
        second.__enter__()
        assert torch.equal(one(**inputs).logits, expected[0])
        first.__exit__(None, None, None)
        assert torch.equal(two(**inputs).logits, expected[1]), "the second is still observed"
        second.__exit__(None, None, None)
    assert [everything_of(model) for model in (one, two)] == before


def test_a_copy_of_a_model_that_is_being_pruned_is_refused() -> None:
    """It would be pruned for good, and its generate would be the original's."""
    model, inputs = random_blip2()
    with prune(model, HALF) as pruning:
        with pytest.raises(PruningError, match=r"cannot be copied or pickled.*Copy it before the context or after it"):
            copy.deepcopy(model)
        assert len(model.state_dict()) and model(**inputs) and pruning.keep is not None
    twin = copy.deepcopy(model)
    with prune(twin, HALF):
        assert torch.equal(twin(**inputs).logits, by_policy(model, inputs, HALF))


def by_policy(model: nn.Module, inputs: dict[str, Tensor], policy: PruningPolicy, **settings: Any) -> Tensor:
    with torch.no_grad(), prune(model, policy, **settings):
        return model(**inputs).logits


def test_a_guide_that_is_pruned_later_is_refused_when_it_is_asked_and_answers_again_afterwards() -> None:
    row, small = BY_NAME["Llava"], small_llava().eval()
    inputs, model = row.inputs([0], dtype=torch.float32), replace(row, name="guided").model(torch.float32)
    with torch.no_grad(), prune(model, RULE, guide=small) as pruning:
        expected = model(**inputs).logits
        refusal = pytest.raises(PruningError, match="LlavaForConditionalGeneration is being pruned already")
        with prune(small, PruningPolicy(scorer="stride")), refusal:
            model(**inputs)
        pruning.keep = None
        assert torch.equal(model(**inputs).logits, expected) and pruning.keep is not None


# --- Threads


def together(*runs: Callable[[], Any]) -> list[Any]:
    """What each found, or raised, in a thread of its own, begun at the same time."""
    ready = threading.Barrier(len(runs))
    found: list[Any] = [None] * len(runs)

    def one(number: int) -> None:
        ready.wait(60)
        try:
            found[number] = runs[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(runs))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive(), "a thread waits for ever"
    finally:
        sys.setswitchinterval(before)
    return found


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


def test_a_file_gets_the_rights_the_umask_gives_without_the_umask_being_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the process's: to read it is to set it, and for that moment other threads make files anybody may write."""
    set_mask = os.umask
    for mask, rights in ((0o077, 0o600), (0o022, 0o644)):
        before = set_mask(mask)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
                file = write_text(tmp_path / f"file of {mask:o}", "text")
        finally:
            set_mask(before)
        assert stat.S_IMODE(file.stat().st_mode) == rights
