"""However often a model is pruned, it is what it was, and nothing of it stays: no hook, no tensor, no memory."""

import contextlib
import ctypes
import gc
import os
import tracemalloc
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import catp_lightning
from catp_lightning import CrossAttentionCalibration, PrunedModule, PruningError, PruningPolicy, TokenPruning, prune
from tests.support.calibrations import data
from tests.support.families import BY_NAME
from tests.support.footprints import everything_of
from tests.support.guides import small_llava
from tests.support.matrix import PlantedError, fail
from tests.support.models import random_blip2
from tests.support.modules import Answering, Generating
from tests.support.oracles import IMAGE, VIDEO, Inputs
from tests.support.policies import HALF
from tests.support.trainers import loading, trainer

LITTLE = 8 * 2**20
"""Bytes by which a process may grow once it is warm; 1,000 cycles that lose 16 KiB each grow by twice as much."""


@dataclass(frozen=True)
class Case:
    """A family and a policy; together they observe and drop in every place there is."""

    row: str
    scorer: str
    args: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.row}-{self.scorer}"

    @property
    def policy(self) -> PruningPolicy:
        return PruningPolicy(self.scorer, dict(self.args), keep=0.5)

    def model(self) -> PreTrainedModel:
        return replace(BY_NAME[self.row], name=f"{self} of the tests of leaks").model(torch.float32)

    def inputs(self) -> Inputs:
        row = BY_NAME[self.row]
        return row.oracle.forward_inputs(row.inputs([0], dtype=torch.float32))

    @property
    def guide(self) -> PreTrainedModel | None:
        return _guide() if self.scorer == "sgl" else None


@cache
def _guide() -> PreTrainedModel:
    return replace(BY_NAME["Llava"], name="guide of the tests of leaks", make=small_llava).model(torch.float32)


CASES = [
    Case("Blip2-OPT", "catp"),
    Case("Blip2-OPT", "l2-norm"),
    Case("Blip2-T5", "self-attention"),
    Case("Llava", "fastervlm"),
    Case("Llava", "fastv"),
    Case("Llava", "visionzip"),
    Case("Llava", "sgl", (("answer_tokens", 2),)),
    Case("Mllama", "trimmed-llama"),
]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """What was there before is looked at no more: the collector has only to do with what is made here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def registered() -> list[str]:
    return [*AttentionInterface().valid_keys(), *AttentionMaskInterface().valid_keys()]


def alive() -> Counter[str]:
    """Objects that are reachable, by kind: tensors, functions, threads of execution, and whatever is our own."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, (Tensor, types.FunctionType, types.MethodType, types.GeneratorType, contextlib.ExitStack)):
            found[kind.__name__] += 1
        elif str(kind.__module__).partition(".")[0] == "catp_lightning":
            found[kind.__qualname__] += 1
    return found


def growing(step: Callable[[], Any], times: int) -> dict[str, int]:
    """Kinds of object of which every repetition of a step leaves some, with how many the longer of two runs left.

    A leak grows with the repetitions: it is there in the first run of `times` and in the second, twice as long, which
    leaves at least one for every second repetition. What a library makes once, or has one more of now and then, does
    not.
    """
    alive()  # what the measure itself makes at first
    left = []
    for length in (times, 2 * times):
        before = alive()
        for _ in range(length):
            step()
        left.append(alive() - before)
    first, second = left
    return {kind: count for kind, count in second.items() if count >= times and first[kind] > 0}


def memory() -> int:
    """Bytes that this process has of the machine's memory, once it has given back what it can."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ways(case: Case, model: PreTrainedModel, inputs: Inputs) -> list[Callable[[], None]]:
    """What may happen in a context: nothing, a forward, text, an error of the user's, one inside the model."""
    given = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}

    def enter(*calls: Callable[[], Any]) -> None:
        with prune(model, case.policy, guide=case.guide):
            for call in calls:
                call()

    def break_inside() -> None:
        hook = model.get_decoder().register_forward_pre_hook(fail)
        try:
            with pytest.raises(PlantedError):
                enter(lambda: model(**inputs))
        finally:
            hook.remove()

    def break_outside() -> None:
        with pytest.raises(PlantedError):
            enter(lambda: model(**inputs), fail)

    def refused() -> None:
        with pytest.raises(PruningError, match="does not nest"):
            enter(enter)

    return [
        enter,
        lambda: enter(lambda: model(**inputs)),
        lambda: enter(lambda: model.generate(**inputs, **given)),
        break_inside,
        break_outside,
        refused,
    ]


def assert_cycles_leave_nothing(case: Case, cycles: int) -> None:
    model, inputs = case.model(), case.inputs()
    each = ways(case, model, inputs)
    with torch.no_grad():
        model(**inputs)  # transformers sets hooks and attributes of its own in a first call
        model.generate(**inputs, max_new_tokens=1)
        before = everything_of(model)
        for way in each * 2:
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


def ours() -> int:
    """Bytes of Python's own memory that was asked for on behalf of our lines and is still held."""
    folder = str(Path(catp_lightning.__file__).parent / "*")
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, folder, all_frames=True)])
    return sum(trace.size for trace in snapshot.traces)


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


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While inside, what is freed was freed because nothing refers to it: the collector of cycles does not run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_is_freed_with_its_last_reference(case: Case) -> None:
    """Whoever deletes a model of many gigabytes to load the next cannot wait for the collector of cycles."""
    model = replace(BY_NAME[case.row], name="freed").make().eval()
    inputs = case.inputs()
    with uncollected():
        with torch.no_grad(), prune(model, case.policy, guide=case.guide) as pruning:
            model(**inputs)
        kept, record, gone = pruning.keep, weakref.ref(pruning), weakref.ref(model)
        del pruning
        assert record() is None
        del model
        assert gone() is None and kept is not None


def test_after_loops_wrapper_and_calibration_a_model_is_freed(tmp_path: Path) -> None:
    module = Answering()
    callback, calibration = TokenPruning(HALF), CrossAttentionCalibration(tmp_path / "p.json", keep=0.5)
    trainer(callback).validate(module, module.loader())
    trainer().predict(PrunedModule(module, HALF), module.loader())
    with pytest.raises(RuntimeError, match="planted"):
        trainer(callback).predict(Broken(), module.loader())
    batches = loading(data(24, 12))
    calibrated = Generating()
    trainer(calibration).predict(calibrated, batches)
    gone = [weakref.ref(module.model), weakref.ref(calibrated.net)]
    for each in (callback, calibration):  # where Lightning puts the module's own methods
        vars(each).pop("log", None), vars(each).pop("log_dict", None)
    del module, calibrated
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert calibration.policies and callback.figures, "the callbacks are still there"


class Broken(Answering):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.model(**batch)
        raise RuntimeError("planted")


def test_a_record_that_is_kept_holds_only_choices() -> None:
    """Not features, attention maps or autograd graphs of its calls, nor views of them, which hold all of them."""
    for case in CASES:
        model, inputs = case.model(), case.inputs()
        with prune(model, case.policy, guide=case.guide) as pruning:
            model(**inputs)  # with gradients
            if case.row != "Mllama":
                model.get_image_features(inputs["pixel_values"])  # what is seen of it nobody takes
        record = vars(pruning)
        own = [record["keep"], record["scores"], *record["tokens_per_layer"], *record["images"]]
        own += [tensor for choice in pruning.choices for tensor in choice]
        own += [pruning.carrier] if pruning.carrier is not None else []
        assert len(pruning.choices) == 1
        for tensor in own:
            assert not tensor.requires_grad and tensor.untyped_storage().nbytes() <= 8 * pruning.keep.numel(), case
        values = [pruning._observer.values, pruning._observer._taken, getattr(pruning._guide, "_found", ())]
        assert [len(value) for value in values] == [0, 0, 0], case


@pytest.mark.slow
def test_a_thousand_calls_in_one_context_grow_to_a_bound() -> None:
    """Choices of the last 1,024 prefills are kept for whoever reads them; beyond that memory is flat."""
    case = CASES[0]
    model, inputs = case.model(), case.inputs()
    with prune(model, case.policy) as pruning:

        def call(times: int) -> None:
            for _ in range(times):
                model(**inputs)  # with gradients: a graph that is held would be large

        call(1030)
        held = memory()
        assert growing(lambda: call(1), 333) == {}
        assert len(pruning.choices) == len(pruning.tokens_per_layer) == 1024
        assert memory() - held < LITTLE


def assert_loops_leave_nothing(loop: Callable[[], Any], module: nn.Module, times: int) -> None:
    for _ in range(3):
        loop()
    before, held = everything_of(module), memory()
    assert growing(loop, times) == {}
    assert everything_of(module) == before
    assert memory() - held < LITTLE


@pytest.mark.parametrize("loops", [4, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("compare", [False, True], ids=["", "compare"])
def test_validation_loops_leave_nothing(loops: int, compare: bool) -> None:
    module = Answering()
    run = trainer(TokenPruning(HALF, compare=compare))
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


@pytest.mark.parametrize("steps", [16, pytest.param(333, marks=pytest.mark.slow)])
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

    def calibrate() -> None:
        calibrate(module, batches, tmp_path / "p.json")

    assert_loops_leave_nothing(calibrate, module, 2)
