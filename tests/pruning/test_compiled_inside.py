"""What is compiled inside a context gives the answers of what is not."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy, prune
from tests.support.families import BY_NAME
from tests.support.matrix import generate, uneven
from tests.support.models import ONE_LAYER, random_blip2
from tests.support.policies import HALF

pytestmark = pytest.mark.usefixtures("nothing_compiled")


def several(name: str) -> list[dict[str, Tensor]]:
    """Prompts of two samples that differ in length and in how many tokens they keep."""
    row = BY_NAME[name]
    count = len(row.samples())
    order = [(0, 0), (1, 3), (0, 5), (2, 1), (1, 2), (0, 7), (2, 4), (1, 9), (2, 0), (0, 2)]
    return [row.inputs([first, (first + 1) % count], pads, dtype=torch.float32) for first, pads in order]


def answers(name: str, model: PreTrainedModel, prompts: list[dict[str, Tensor]], graphs: Any = None) -> list[Any]:
    """Of each the tokens, the logits of generate and of forward, and how many graphs were compiled by then."""
    found = []
    for inputs in prompts:
        row = BY_NAME[name]
        steps, logits = generate(row, model, inputs), model(**row.oracle.forward_inputs(inputs)).logits
        found.append((*steps, logits, graphs.frame_count if graphs else 0))
    return found


def compile_in_place(model: PreTrainedModel, path: str, backend: Any) -> PreTrainedModel:
    (model.get_submodule(path) if path else model).compile(backend=backend)
    return model


def compile_by_wrapping(model: PreTrainedModel, path: str, backend: Any) -> Any:
    if not path:
        return torch.compile(model, backend=backend)
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    setattr(owner, name, torch.compile(getattr(owner, name), backend=backend))
    return model


def check_compiled_inside(
    name: str, policy: PruningPolicy, path: str, how: Callable[..., Any], backend: str = "eager", prompts: int = 10
) -> int:
    """Returns how many graphs there are in the end.

    Logits are the uncompiled ones to rounding: transformers makes other masks where it is traced, for other kernels.
    """
    row = BY_NAME[name]
    model, inputs = row.model(torch.float32), several(name)[:prompts]
    choose = uneven() if policy == PruningPolicy() else None
    with torch.no_grad():
        full = answers(name, model, inputs[:1])
        with prune(model, policy, choose=choose):
            expected = answers(name, model, inputs)
        graphs = CompileCounterWithBackend(backend)
        with prune(model, policy, choose=choose) as pruning:
            compiled = how(model, path, graphs)
            found = answers(name, compiled, inputs, graphs)
        held = model.get_submodule(path)
        if hasattr(held, "_orig_mod"):  # the wrapper that was put in is the user's to take out
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent) if parent else model, last, held._orig_mod)
        again = answers(name, compiled, inputs[:1])
    assert pruning.keep is not None
    atol = (1e-5 if backend == "eager" else 1e-4) * full[0][1].abs().max().item()
    for (tokens, *logits, _), (right, *right_logits, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, right_logits, rtol=0.0, atol=atol)
        assert torch.equal(tokens, right)
    assert (found[0][1] - full[0][1]).abs().max() > 100 * atol, "pruning must move logits, or this proves nothing"
    torch.testing.assert_close(again[0][1], full[0][1], rtol=0.0, atol=atol)  # a wrapper that is still held: unpruned
    assert found[-1][-1] == found[len(found) // 2][-1], "later prompts compile nothing new"
    return int(found[-1][-1])


@pytest.mark.slow
def test_a_language_model_compiled_inside_answers_alike_and_soon_compiles_nothing_new() -> None:
    policy = PruningPolicy(scorer="stride", keep=0.4)
    assert check_compiled_inside("Llava", policy, "model.language_model", compile_in_place, prompts=3) > 0


@pytest.mark.slow
def test_a_language_model_compiled_inside_needs_no_more_graphs_than_an_unpruned_one() -> None:
    policy = PruningPolicy(scorer="fastervlm", keep=0.4)
    graphs = check_compiled_inside("Llava", policy, "model.language_model", compile_in_place)
    torch._dynamo.reset()
    model, plain = BY_NAME["Llava"].model(torch.float32), CompileCounterWithBackend("eager")
    compile_in_place(model, "model.language_model", plain)
    with torch.no_grad():
        answers("Llava", model, several("Llava"), plain)
    model.model.language_model._compiled_call_impl = None
    assert 0 < graphs <= plain.frame_count


INSIDE = [
    ("Llava", PruningPolicy(scorer="fastervlm", keep=0.4), ("model.language_model", "model.vision_tower", "")),
    ("Llava", PruningPolicy(scorer="fastv", keep=0.4), ("model.language_model",)),
    ("Llava", PruningPolicy(scorer="visionzip", keep=0.4), ("model.language_model",)),
    ("Blip2-OPT", HALF, ("language_model", "language_model.model.decoder", "qformer", "")),
    ("Blip2-T5", HALF, ("language_model", "")),
    ("Mllama", PruningPolicy(scorer="trimmed-llama", keep=0.5), ("model.language_model", "")),
    ("Qwen2.5-VL", PruningPolicy(), ("model.language_model",)),
    ("Gemma3", PruningPolicy(), ("model.language_model",)),
]


@pytest.mark.slow
@pytest.mark.parametrize("how", [compile_in_place, compile_by_wrapping])
@pytest.mark.parametrize(
    ("name", "policy", "path"),
    [
        pytest.param(name, policy, path, id=f"{name}-{policy.scorer}-{path or 'all'}")
        for name, policy, paths in INSIDE
        for path in paths
    ],
)
def test_every_part_compiled_inside_answers_alike(
    name: str, policy: PruningPolicy, path: str, how: Callable[..., Any]
) -> None:
    check_compiled_inside(name, policy, path, how)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("path", ["model.language_model", ""])
def test_inductor_answers_alike(path: str) -> None:
    policy = PruningPolicy(scorer="fastervlm", keep=0.4)
    check_compiled_inside("Llava", policy, path, compile_in_place, "inductor", prompts=4)


def held_wrapper(model: Any) -> Callable[..., Tensor]:
    """A compiled language model that the user keeps outside of the model, and puts in for each call."""
    inner, compiled = model.language_model, torch.compile(model.language_model, backend="eager")

    def call(**inputs: Tensor) -> Tensor:
        model.language_model = compiled
        try:
            return model(**inputs).logits
        finally:
            model.language_model = inner

    return call


def compiled_function(model: Any) -> Callable[..., Tensor]:
    return torch.compile(lambda **inputs: model(**inputs).logits, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [held_wrapper, compiled_function])
def test_code_compiled_earlier_that_cannot_be_seen_runs_pruned_inside_and_unpruned_outside(
    kept: Callable[..., Any],
) -> None:
    """torch.compile does not guard hooks: without more, code compiled before would run on unpruned."""
    model, inputs = random_blip2(shape=ONE_LAYER)
    others = {"half": HALF, "outputs": PruningPolicy(scorer="l2-norm", keep=0.25)}
    with torch.no_grad():
        full, call, expected = model(**inputs).logits, kept(model), {}
        for name, policy in others.items():
            with prune(model, policy):
                expected[name] = model(**inputs).logits
        for name in ("full", "half", "full", "outputs", "half", "full"):
            if name == "full":
                assert torch.equal(call(**inputs), full)
                continue
            with prune(model, others[name]):
                assert torch.equal(call(**inputs), expected[name]), name


@pytest.mark.slow
def test_layers_compiled_in_one_context_are_pruned_by_the_hooks_of_the_next() -> None:
    """The second policy drops inside the decoder: its hooks are on layers that the first one's code runs straight."""
    row = BY_NAME["Llava"]
    model, inputs = row.model(torch.float32), row.inputs(dtype=torch.float32)
    policies = [
        PruningPolicy(scorer="position", keep=1000),  # all of them: shapes stay, and nothing else asks for new code
        PruningPolicy(scorer="visual-exit", scorer_args={"layer": 1}),
    ]
    for policy in policies:
        with torch.no_grad(), prune(model, policy):
            expected = model(**inputs).logits
        with torch.no_grad(), prune(model, policy):
            model.model.language_model.compile(backend="eager")
            assert torch.equal(model(**inputs).logits, expected)
    assert model.model.language_model._compiled_call_impl is None
