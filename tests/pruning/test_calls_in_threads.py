"""Calls of a pruned model in other threads are refused or undisturbed, also when its context is left meanwhile."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.caches import every_place, kept_by
from tests.support.families import BY_NAME
from tests.support.matrix import EVERYTHING, uneven
from tests.support.oracles import CACHE
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")


class Until(StoppingCriteria):
    """Holds a `generate` after its first token until it may go on."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        self.begun.set()
        assert self.go.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def in_a_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


@every_place
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_a_generate_in_another_thread_that_outlives_the_context_is_refused(
    row: Row, policy: PruningPolicy, use_cache: bool
) -> None:
    model, inputs, hold = row.model(), row.inputs(), Until()
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with prune(model, policy, **kept_by(policy)):
        thread, found = in_a_thread(
            lambda: model.generate(
                **inputs,
                max_new_tokens=3,
                do_sample=False,
                use_cache=use_cache,
                stopping_criteria=StoppingCriteriaList([hold]),
            )
        )
        assert hold.begun.wait(60)
    hold.go.set()
    thread.join(60)
    assert isinstance(found[0], PruningError), found
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)


@every_place
@pytest.mark.parametrize("where", ["vision", "language"])
def test_a_forward_in_another_thread_that_outlives_the_context_is_refused(
    row: Row, policy: PruningPolicy, where: str
) -> None:
    model, inputs = row.model(), row.oracle.forward_inputs(row.inputs())
    begun, go = threading.Event(), threading.Event()
    vision = next(part for name, part in model.named_modules() if "vision" in name and isinstance(part, nn.LayerNorm))
    module: nn.Module = vision if where == "vision" else row.oracle.inside(model)

    def hold(*args: object) -> None:
        begun.set()
        assert go.wait(60)

    hook = module.register_forward_pre_hook(hold)
    with prune(model, policy, **kept_by(policy)):
        thread, found = in_a_thread(lambda: model(**inputs))
        assert begun.wait(60)
    go.set()
    thread.join(60)
    hook.remove()
    assert isinstance(found[0], PruningError), found


def test_a_generate_that_begins_in_another_thread_after_the_context_was_left_is_refused() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()):
        late = functools.partial(model.generate, **inputs, max_new_tokens=2)
    with pytest.raises(PruningError, match="or before it began"):
        late()
    model.generate(**inputs, max_new_tokens=2)


@every_place
def test_after_a_call_that_failed_or_was_interrupted_its_cache_is_refused_and_other_threads_may_call(
    row: Row, policy: PruningPolicy
) -> None:
    model, inputs = row.model(), row.oracle.forward_inputs(row.inputs())
    text = model.config.get_text_config()
    for error in (RuntimeError, KeyboardInterrupt):
        cache = DynamicCache(config=text)
        given = {} if row.name.startswith("Blip2") else {CACHE: cache}

        def stop(*args: object, error: type[BaseException] = error) -> None:
            raise error

        with prune(model, policy, **kept_by(policy)):
            hook = row.oracle.inside(model).register_forward_pre_hook(stop)
            with pytest.raises(error):
                model(**inputs, **given)
            hook.remove()
            thread, found = in_a_thread(lambda: model(**inputs).logits)
            thread.join(60)
            assert isinstance(found[0], Tensor), found
            if error is RuntimeError and cache.get_seq_length() > 0:
                states = torch.zeros_like(cache.layers[0].keys[:, :, :1])
                with pytest.raises(PruningError, match="holds a pruned prompt"):
                    cache.update(states, states, 0)


def test_of_two_threads_that_call_one_pruned_model_the_second_is_refused() -> None:
    row = BY_NAME["Llava"]
    model, inputs, hold = row.model(), row.inputs(), Until()
    with prune(model, EVERYTHING, choose=uneven()):
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        thread, found = in_a_thread(
            lambda: model.generate(
                **inputs, max_new_tokens=3, do_sample=False, stopping_criteria=StoppingCriteriaList([hold])
            )
        )
        assert hold.begun.wait(60)
        for call in (model, model.generate):
            with pytest.raises(PruningError, match="Another thread is calling"):
                call(**inputs)
        hold.go.set()
        thread.join(60)
        assert torch.equal(found[0], expected), "the first is not disturbed"
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("name", ["Llava", "Blip2-OPT"])
def test_continuous_batching_is_refused_before_its_thread_begins(name: str) -> None:
    model = BY_NAME[name].model()
    with prune(model, PruningPolicy("random", keep=0.5)):
        before = threading.enumerate()
        with pytest.raises(PruningError, match="share, and no prompt can be made shorter"):
            model.init_continuous_batching()
        with pytest.raises(PruningError, match="Call generate on a batch, or leave the prune context"):
            model.generate_batch([[5, 6, 7]], max_new_tokens=2)
        new = [thread for thread in threading.enumerate() if thread not in before]
        assert not any(type(thread) is threading.Thread for thread in new)  # a progress bar has one of its own kind
    assert "init_continuous_batching" not in vars(model)
