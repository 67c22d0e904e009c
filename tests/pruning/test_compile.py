"""torch.compile: what was compiled before is refused, and what a loop compiles itself is pruned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

from catp_lightning import CrossAttentionCalibration, PrunedModule, PruningError, TokenPruning, prune
from tests.support.footprints import footprint
from tests.support.models import ONE_LAYER, random_blip2
from tests.support.modules import Answering, by_hand, same, unpruned
from tests.support.oracles import CACHE
from tests.support.policies import HALF
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("nothing_compiled")


DECODER = "model.language_model.model.decoder"


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
    module = Answering()
    loader, module = module.loader(), BEFORE[how](module)

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


@pytest.mark.slow
def test_a_loop_compiled_as_the_message_says_is_pruned_and_nothing_is_compiled_afterwards() -> None:
    module, plain = CompilesWhenLoopsStart(), Answering(random_blip2(shape=ONE_LAYER))
    module.loss = nn.Linear(2, 2)
    module.loss.compile(backend="eager")  # beside the model, it may be compiled before and stays so
    expected, before = by_hand(plain), footprint(module.model)
    pruning = trainer(TokenPruning(HALF))
    for _ in range(2):  # what the first loop compiled does not stand in the way of the second
        assert same(pruning.predict(module, module.loader()), expected)
        assert module.compiled.frame_count > 0 and footprint(module.model) == before
    assert [part for part in module.modules() if part._compiled_call_impl] == [module.loss]
    assert same(unpruned(module), unpruned(plain))


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
    module.settings = {CACHE: cache}
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


@pytest.mark.slow
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
