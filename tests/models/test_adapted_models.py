"""Models that are not as they were built: with adapters, or with parts that live elsewhere."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Blip2ForConditionalGeneration

from catp_lightning import CrossAttentionCalibration, PolicyError, PruningPolicy, TokenPruning, prune
from tests.callbacks.test_calibration import SHORT, data
from tests.callbacks.test_token_pruning import trainer
from tests.pruning.test_families import generate, state, uneven
from tests.support import models
from tests.support.families import ROWS
from tests.support.models import GREEDY, SHAPES, random_blip2
from tests.support.oracles import columns_kept, hooked

HALF = PruningPolicy(scorer="catp", keep=0.5)
FAMILIES = {repr(row): row for row in ROWS}


class Holder(L.LightningModule):
    """A user's module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch, labels=batch["input_ids"]).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated = self.net(**batch).logits

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net.generate(**batch, **SHORT)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([weight for weight in self.parameters() if weight.requires_grad], lr=1e-2)


def loader(*batches: dict[str, Tensor]) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def pruned(module: Any, inputs: dict[str, Tensor], policy: PruningPolicy = HALF) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, generated tokens, and what was kept."""
    with torch.no_grad(), prune(module, policy) as pruning:
        logits, tokens = module(**inputs).logits, module.generate(**inputs, **GREEDY)
    assert pruning.keep is not None
    return logits, tokens, pruning.keep


def assert_alike(one: tuple[Tensor, ...], other: tuple[Tensor, ...], relative: float = 1e-5) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0.0, atol=relative * other[0].abs().max().item())
    assert all(map(torch.equal, one[1:], other[1:]))


def check_dropping_equals_masking(model: Any, inputs: dict[str, Tensor]) -> None:
    """On a BLIP-2 as it is: with its adapters, or its rounded weights."""
    logits, tokens, keep = pruned(model, inputs)
    layers = list(model.get_submodule("language_model.model.decoder.layers"))
    names = {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == models.IMAGE, 110)}  # the oracles' id
    gone = ~columns_kept(names, keep)

    def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        mask = kwargs["attention_mask"]
        hidden = torch.zeros(len(gone), mask.shape[-1], dtype=torch.bool)
        hidden[:, : gone.shape[1]] = gone
        own = torch.arange(mask.shape[-1] - mask.shape[-2], mask.shape[-1])[:, None] == torch.arange(mask.shape[-1])
        seen = mask if mask.dtype == torch.bool else mask == 0
        return {"attention_mask": seen & ~(hidden[:, None, None] & ~own)}

    with torch.no_grad():
        full = model(**inputs).logits
        with hooked(layers, hide):
            masked, masked_tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    rows, scale = ~gone & inputs["attention_mask"].bool(), full.abs().max().item()
    assert (full[rows] - masked[rows]).abs().max() > 0.1 * scale, "dropping must move logits, or this proves nothing"
    assert (logits[rows] - masked[rows]).abs().max() < 2e-5 * scale
    assert torch.equal(tokens, masked_tokens)


def check_calibrates(model: nn.Module, path: Path) -> PruningPolicy:
    module, batches = Holder(model), data(16, 8)
    callback = CrossAttentionCalibration(path / "policy.json", keep=0.5)
    with torch.no_grad():
        expected = [module.net.generate(**batch, **SHORT) for batch in batches]
    predicted = trainer(callback).predict(module, loader(*batches))
    assert all(map(torch.equal, predicted, expected))
    with torch.no_grad(), prune(module, callback.policies[0]) as pruning:
        module.net(**batches[0])
    assert pruning.keep.sum(1).tolist() == [4] * 8
    return callback.policies[0]


# ---- parts that live elsewhere

OFFLOADED = {
    "query_tokens": "cpu",
    "vision_model": "disk",
    "qformer": "cpu",
    "language_projection": "cpu",
    "language_model": "disk",
}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, OFFLOADED], ids=["cpu", "everything", "offloaded"])
def test_a_model_loaded_with_a_device_map_gives_the_pruned_answers_of_the_plain_one(
    device_map: Any, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model, inputs = random_blip2()
    model.save_pretrained(tmp_path / "model")
    loaded = Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    assert any(weight.is_meta for weight in loaded.parameters()) == (device_map is OFFLOADED)
    with torch.no_grad():
        plain = loaded(**inputs).logits
        before = state(loaded)
        assert_alike(pruned(loaded, inputs), pruned(model, inputs))
        assert state(loaded) == before
        assert torch.equal(loaded(**inputs).logits, plain)


PLACES = {
    "Llava": {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    },
    "Mllama": {  # its vision tower does not run from disk, unpruned as well
        "model.vision_model": "cpu",
        "model.multi_modal_projector": "disk",
        "model.language_model": "disk",
        "lm_head": "disk",
    },
    "Blip2-T5": OFFLOADED,
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("when", ["before", "inside"])
def test_parts_dispatched_to_disk_before_or_inside_the_context_change_no_answer(
    name: str, when: str, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    row = FAMILIES[name]
    plain, inputs = row.model(torch.float32), row.inputs(dtype=torch.float32)

    def send(model: Any) -> None:
        accelerate.dispatch_model(model, PLACES[name], main_device="cpu", offload_dir=str(tmp_path / "offload"))

    with torch.no_grad():
        full = generate(row, plain, inputs)
        with prune(plain, PruningPolicy(), choose=uneven()):
            expected = generate(row, plain, inputs)
        model = copy.deepcopy(plain)
        if when == "before":
            send(model)
        before = {path: part.__dict__.get("forward") for path, part in model.named_modules()}
        with prune(model, PruningPolicy(), choose=uneven()):
            if when == "inside":
                send(model)
            found = generate(row, model, inputs)
        if when == "before":
            assert before == {path: part.__dict__.get("forward") for path, part in model.named_modules()}
        again = generate(row, model, inputs)
        with prune(model, PruningPolicy(), choose=uneven()):
            once_more = generate(row, model, inputs)
    assert any(weight.is_meta for weight in model.parameters()), "something must be offloaded"
    assert not torch.equal(expected[1], full[1])
    for one, other in ((found, expected), (again, full), (once_more, expected)):
        assert all(map(torch.equal, one, other))


# ---- adapters


@pytest.fixture
def adapted() -> tuple[Any, dict[str, Tensor]]:
    """LoRA on the vision tower, the Q-Former and the language model, with weights that matter."""
    return lora()


def lora(**settings: Any) -> tuple[Any, dict[str, Tensor]]:
    peft = pytest.importorskip("peft")
    model, inputs = random_blip2()
    targets = ["q_proj", "v_proj", "qkv", "query", "value"]
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False, **settings)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config).eval(), inputs


def test_an_adapted_model_is_pruned_as_the_model_it_merges_to(adapted: Any) -> None:
    model, inputs = adapted
    base, _ = random_blip2()
    before, found = state(model), pruned(model, inputs)
    assert state(model) == before
    (predicted,) = trainer(TokenPruning(HALF)).predict(Holder(model), loader(inputs))
    with torch.no_grad(), prune(Holder(model), HALF):
        assert torch.equal(model.generate(**inputs, **SHORT), predicted)
    merged = model.merge_and_unload()
    assert (pruned(base, inputs)[0] - found[0]).abs().max() > 1, "adapters must move logits, or this proves nothing"
    assert_alike(found, pruned(merged, inputs), 1e-4)
    check_dropping_equals_masking(merged, inputs)


def test_adapters_switched_off_and_on_inside_the_context_are_off_and_on(adapted: Any) -> None:
    model, inputs = adapted
    base, _ = random_blip2()
    expected = pruned(base, inputs)
    with torch.no_grad(), prune(model, HALF) as pruning:
        on = model(**inputs).logits
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected[0]) and torch.equal(pruning.keep, expected[2])
        assert torch.equal(model(**inputs).logits, on) and not torch.equal(on, expected[0])


def test_a_policy_of_the_base_model_is_accepted_by_the_adapted_one_and_refused_by_another_shape(
    adapted: Any, tmp_path: Path
) -> None:
    base, inputs = random_blip2()
    policy = check_calibrates(base, tmp_path)
    model, _ = adapted
    assert pruned(model, inputs, policy)[2].sum(1).tolist() == [4] * 3
    other, _ = random_blip2(shape=SHAPES["5 queries, every layer crosses"])
    with pytest.raises(PolicyError, match="The policy was made for blip-2 with 8 visual tokens"), prune(other, policy):
        pass


def test_an_adapted_model_is_calibrated(adapted: Any, tmp_path: Path) -> None:
    check_calibrates(adapted[0], tmp_path)


@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": ["language_projection"]}], ids=["lora", "modules_to_save"]
)
def test_adapters_train_as_without_pruning_while_validation_is_pruned(settings: dict[str, Any]) -> None:
    found = []
    for callbacks in ([], [TokenPruning(HALF)]):
        model, inputs = lora(**settings)
        module = Holder(model.train())
        frozen = {name: w.clone() for name, w in model.named_parameters() if not w.requires_grad}
        fit = trainer(*callbacks, max_epochs=2, num_sanity_val_steps=0)
        torch.manual_seed(0)
        fit.fit(module, loader(inputs), loader(inputs))
        weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        assert all(torch.equal(w, frozen[name]) for name, w in model.named_parameters() if name in frozen)
        found.append((weights, module, inputs))
    (alone, _, _), (beside, module, inputs) = found
    start = dict(lora(**settings)[0].named_parameters())
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert any(not torch.equal(alone[name], start[name]) for name in alone), "it must have trained"
    assert torch.equal(module.validated, pruned(module.net.eval(), inputs)[0])
