"""torch.compile: what was compiled before is refused, what is compiled inside gives the answers of what is not."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, PreTrainedModel, StaticCache

from catp_lightning import CrossAttentionCalibration, PrunedModule, PruningError, PruningPolicy, TokenPruning, prune
from tests.support.families import BY_NAME
from tests.support.footprints import footprint
from tests.support.matrix import generate, uneven
from tests.support.models import Shape, random_blip2
from tests.support.modules import Answering, by_hand, same, unpruned
from tests.support.policies import HALF
from tests.support.trainers import loading, trainer

ONE_LAYER = Shape(vision_layers=1, qformer_layers=1, frequency=1, text_layers=1)  # compiling costs time by the layer
DECODER = "model.language_model.model.decoder"


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Compiled code belongs to the process, not to a model: each test begins, and ends, without any."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_place(path: str) -> Callable[[Answering], L.LightningModule]:
    def compiled(module: Answering) -> L.LightningModule:
        (module.get_submodule(path) if path else module).compile(backend="eager")
        return module

    return compiled


def attribute(path: str, name: str) -> Callable[[Answering], L.LightningModule]:
    def compiled(module: Answering) -> L.LightningModule:
        owner = module.get_submodule(path) if path else module
        setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
        return module

    return compiled


BEFORE: dict[str, Callable[[Answering], Any]] = {
    "module.compile()": in_place(""),
    "model.compile()": in_place("model"),
    "language_model.compile()": in_place("model.language_model"),
    "a decoder layer's compile()": in_place(f"{DECODER}.layers.1"),
    "torch.compile(module)": lambda module: torch.compile(module, backend="eager"),
    "torch.compile(model)": attribute("", "model"),
    "torch.compile(language_model)": attribute("model", "language_model"),
    "torch.compile(model.forward)": attribute("model", "forward"),
    "torch.compile(model.generate)": attribute("model", "generate"),
    "torch.compile(module.predict_step)": attribute("", "predict_step"),
}


@pytest.mark.parametrize("how", BEFORE)
def test_what_was_compiled_before_is_refused_everywhere(how: str, tmp_path: Path) -> None:
    module = BEFORE[how](Answering())
    loader = Answering().loader()

    def refused() -> Any:
        return pytest.raises(PruningError, match=r"was compiled before pruning \(.*compile inside")

    with refused(), prune(module, HALF):
        pass
    with refused():
        trainer(TokenPruning(HALF)).predict(module, loader)
    with refused():
        trainer(CrossAttentionCalibration(tmp_path / "policy.json")).predict(module, loader)
    if isinstance(module, L.LightningModule):
        with refused():
            trainer().predict(PrunedModule(module, HALF), loader)
    else:
        with pytest.raises(TypeError, match=r"not torch._dynamo.eval_frame.OptimizedModule"):
            PrunedModule(module, HALF)
    assert not list(tmp_path.iterdir())


class CompilesWhenLoopsStart(Answering):
    """As the message says: in a hook that runs inside, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.inputs = random_blip2(shape=ONE_LAYER)
        self.compiled = CompileCounterWithBackend("eager")

    def _compile(self) -> None:
        self.model.language_model.compile(backend=self.compiled)

    def on_validation_start(self) -> None:
        self._compile()

    def on_predict_start(self) -> None:
        self._compile()


def test_a_loop_compiled_as_the_message_says_is_pruned_and_nothing_is_compiled_afterwards() -> None:
    module, plain = CompilesWhenLoopsStart(), Answering(random_blip2(shape=ONE_LAYER))
    expected, before = by_hand(plain), footprint(module.model)
    pruning = trainer(TokenPruning(HALF))
    for _ in range(2):  # what the first loop compiled does not stand in the way of the second
        assert same(pruning.predict(module, module.loader()), expected)
        assert module.compiled.frame_count > 0 and footprint(module.model) == before
    assert not any(part._compiled_call_impl for part in module.modules())
    assert same(unpruned(module), unpruned(plain))


def test_a_part_beside_the_model_that_was_compiled_before_stays_compiled() -> None:
    module = CompilesWhenLoopsStart()
    module.loss = torch.nn.Linear(2, 2)
    module.loss.compile(backend="eager")
    trainer(TokenPruning(HALF)).predict(module, module.loader())
    assert module.loss._compiled_call_impl is not None
    assert not any(part._compiled_call_impl for part in module.model.modules())


@pytest.mark.slow
def test_training_steps_may_be_compiled_and_validation_beside_them_is_pruned() -> None:
    seen = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = Answering(random_blip2(shape=ONE_LAYER))
        if compiled:
            module.training_step = torch.compile(module.training_step, backend="eager")  # type: ignore[method-assign]
        trainer(TokenPruning(HALF), max_epochs=2, num_sanity_val_steps=0).fit(
            module, module.loader(1), module.loader(1)
        )
        seen.append([logits.detach() for logits in module.seen])
    assert len(seen[0]) == 4 and all(map(torch.allclose, *seen))
    assert torch.allclose(seen[1][-1], by_hand(module)[0])
    assert not torch.allclose(seen[1][-1], unpruned(module)[0], atol=1e-2)


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


class Generating(Answering):
    settings: dict[str, Any]

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model.generate(**batch, max_new_tokens=2, do_sample=False, **self.settings)


@pytest.mark.parametrize("settings", ["static", "offloaded_static"])
def test_static_caches_are_refused_under_the_trainer_and_the_default_that_is_advised_works(settings: str) -> None:
    module = Generating()
    module.settings = {"cache_implementation": settings, "disable_compile": True}
    before = footprint(module.model)
    with pytest.raises(PruningError, match=r"static cache cannot be pruned.*Leave cache_implementation at its default"):
        trainer(TokenPruning(HALF)).predict(module, module.loader())
    assert footprint(module.model) == before
    module.settings = {}
    assert len(trainer(TokenPruning(HALF)).predict(module, module.loader())) == 2


def test_a_static_cache_handed_over_is_refused_under_the_trainer() -> None:
    module = Generating()
    cache = StaticCache(config=module.model.language_model.config, max_cache_len=64)
    module.settings = {"past_key_values": cache}
    with pytest.raises(PruningError, match="static cache cannot be pruned"):
        trainer(TokenPruning(HALF)).predict(module, module.loader())


def test_generate_with_a_compile_config_is_pruned_as_without() -> None:
    """transformers compiles decoding for static caches alone."""
    model, inputs = random_blip2(shape=ONE_LAYER)
    settings: dict[str, Any] = {**inputs, "max_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), prune(model, HALF) as pruning:
        expected = model.generate(**settings)
        pruning.keep = None
        assert torch.equal(model.generate(**settings, compile_config=CompileConfig(backend="eager")), expected)
    assert pruning.keep is not None


def test_what_is_compiled_in_a_step_of_pruned_module_is_pruned() -> None:
    class Compiling(Answering):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.model.language_model.compile(backend="eager")
            return super().predict_step(batch, batch_idx)

    module = Compiling()
    module.model, module.inputs = random_blip2(shape=ONE_LAYER)
    predicted = trainer().predict(PrunedModule(module, HALF), loading([module.inputs] * 2))
    expected = by_hand(module)[0]
    assert same(predicted, [expected, expected])
    assert not any(isinstance(part, nn.Module) and part._compiled_call_impl for part in module.modules())
