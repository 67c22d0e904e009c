"""However often a model is pruned, it is what it was, and nothing of it stays: no hook, no tensor, no memory."""

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catp_lightning import PrunedModule, PruningPolicy, TokenPruning, prune
from catp_lightning.pruning.pruner import applied
from tests.support.calibrations import calibrate, data
from tests.support.footprints import everything_of
from tests.support.models import random_blip2
from tests.support.modules import Answering, Generating
from tests.support.policies import HALF
from tests.support.remains import CASES, LITTLE, Case, alive, growing, memory, ours, registered, ways
from tests.support.trainers import trainer

pytestmark = pytest.mark.usefixtures("frozen")


def assert_cycles_leave_nothing(case: Case, cycles: int) -> None:
    model, inputs = case.model(), case.inputs()
    each = ways(case, model, inputs)
    with torch.no_grad():
        model(**inputs)  # transformers sets hooks and attributes of its own in a first call
        model.generate(**inputs, max_new_tokens=1)
        before = everything_of(model)
        for way in each:
            way()
        assert everything_of(model) == before and alive()
        names, held = registered(), memory()

        def once() -> None:
            for way in each:
                way()

        assert growing(once, max(2, cycles // (3 * len(each)))) == {}
        assert everything_of(model) == before
        assert registered() == names
        assert memory() - held < LITTLE


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contexts_leave_a_model_and_the_process_as_they_were(case: Case) -> None:
    assert_cycles_leave_nothing(case, 18 if case.scorer == "sgl" else 36)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_thousand_contexts_leave_a_model_and_the_process_as_they_were(case: Case) -> None:
    assert_cycles_leave_nothing(case, 1000)


@pytest.mark.slow
def test_a_thousand_contexts_without_a_call_grow_nothing() -> None:
    (model, inputs), policy = random_blip2(), PruningPolicy(scorer="catp", keep=0.5)
    model(**inputs)
    before = everything_of(model)

    def cycle(times: int) -> None:
        for _ in range(times):
            with prune(model, policy):
                pass

    cycle(20)
    held = memory()
    assert growing(lambda: cycle(1), 333) == {}
    assert everything_of(model) == before
    assert memory() - held < LITTLE
    tracemalloc.start(4)
    try:
        cycle(60)
        gc.collect()
        first = ours()
        cycle(100)
        gc.collect()
        assert ours() - first < 100 * object.__sizeof__(object()), "not even one object for each context"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", ["tensor", "hook", "name", "record"])
def test_a_leak_of_one_small_thing_a_context_would_be_found(what: str) -> None:
    """The measure measures: each kind of leak, planted, moves one of the figures that other tests hold still."""
    (model, inputs), leaked, hooks = random_blip2(), [], []
    model(**inputs)
    before, names, things = everything_of(model), registered(), alive()
    with prune(model, HALF) as pruning:
        if what == "tensor":
            leaked.append(torch.zeros(1))
        elif what == "hook":
            hooks.append(model.qformer.register_forward_hook(lambda *call: None))
        elif what == "name":
            model.qformer.__dict__["left"] = True
        else:
            leaked.append(pruning)
    del pruning
    try:
        found = {
            "footprint": everything_of(model) != before,
            "alive": {kind for kind, count in alive().items() if count != things[kind]},
        }
    finally:
        for hook in hooks:
            hook.remove()
    assert registered() == names or what == "tensor"  # names of observed attention come with the first context
    assert found["footprint"] == (what in ("hook", "name"))
    assert {"tensor": "Tensor", "hook": "function", "name": "", "record": "Pruning"}[what] in {*found["alive"], ""}


@pytest.mark.parametrize("every", [1, 2])
def test_what_grows_with_the_repetitions_is_found_and_one_object_more_is_not(every: int) -> None:
    leaked: list[Tensor] = []
    turns = 0

    def leaky() -> None:
        nonlocal turns
        turns += 1
        leaked.extend([torch.zeros(1)] if turns % every == 0 else [])

    def noisy() -> None:
        nonlocal turns
        turns += 1
        leaked.extend([torch.zeros(1)] if turns in (2, 9) else [])

    assert growing(leaky, 6)["Tensor"] >= 6
    turns = 0
    assert growing(noisy, 6) == {}


@pytest.mark.slow
def test_a_thousand_calls_in_one_context_hold_no_more_than_one() -> None:
    """Only the last prefill is kept; whoever counts is told of each."""
    case = CASES[0]
    model, inputs = case.model(), case.inputs()
    counted = Counter[int]()
    count = lambda prefill: counted.update([len(prefill.keep)])  # noqa: E731
    with applied(model, case.policy, on_prefill=count) as pruner:

        def call(times: int) -> None:
            for _ in range(times):
                model(**inputs)  # with gradients: a graph that is held would be large

        call(1030)
        held = memory()
        assert growing(lambda: call(1), 333) == {}
        assert counted.total() == pruner.record.prefills > 1030
        assert memory() - held < LITTLE


def assert_loops_leave_nothing(loop: Callable[[], Any], module: nn.Module, times: int) -> None:
    for _ in range(3):
        loop()
    before, held = everything_of(module), memory()
    assert growing(loop, times) == {}
    assert everything_of(module) == before
    assert memory() - held < LITTLE


@pytest.mark.parametrize("loops", [3, pytest.param(70, marks=pytest.mark.slow)])
def test_validation_loops_leave_nothing(loops: int) -> None:
    module = Answering()
    run = trainer(TokenPruning(HALF, compare=True))
    loader = module.loader()

    def loop() -> None:
        run.validate(module, loader, verbose=False)
        module.seen.clear()

    assert_loops_leave_nothing(loop, module, loops)


@pytest.mark.parametrize("epochs", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_epochs_of_fit_with_pruned_validation_leave_nothing(epochs: int) -> None:
    module = Answering()
    run = trainer(TokenPruning(HALF, sanity_check=True), max_epochs=-1, limit_train_batches=1)
    loader = module.loader(1)

    def loop() -> None:
        run.fit_loop.max_epochs = run.current_epoch + 2
        run.fit(module, loader, loader)
        module.seen.clear()

    assert_loops_leave_nothing(loop, module, epochs)


@pytest.mark.parametrize("steps", [6, pytest.param(333, marks=pytest.mark.slow)])
def test_steps_of_the_wrapper_leave_nothing(steps: int) -> None:
    module = Answering()
    wrapper, batch = PrunedModule(module, HALF), next(iter(module.loader()))

    def step() -> None:
        with torch.no_grad():
            wrapper.predict_step(batch, 0)

    assert_loops_leave_nothing(step, module, steps)


@pytest.mark.slow
def test_calibrations_in_one_process_leave_nothing(tmp_path: Path) -> None:
    module, batches = Generating(), data(24, 12)

    def again() -> None:
        calibrate(module, batches, tmp_path / "p.json")

    assert_loops_leave_nothing(again, module, 2)
