"""Models that are not as they were built: with adapters, or with parts that live elsewhere."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from catp_lightning import PolicyError, PruningPolicy, TokenPruning, prune
from catp_lightning.models import find_family
from tests.support.adapted_models import Holder, assert_alike, check_calibrates, check_dropping_equals_masking, pruned
from tests.support.families import BY_NAME
from tests.support.footprints import footprint
from tests.support.matrix import generate, uneven
from tests.support.models import SHAPES, SHORT, random_blip2
from tests.support.policies import HALF
from tests.support.trainers import loading, trainer

# ---- parts that live elsewhere

OFFLOADED = {
    "query_tokens": "cpu",
    "vision_model": "disk",
    "qformer": "cpu",
    "language_projection": "cpu",
    "language_model": "disk",
}


@pytest.mark.slow
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
        before = footprint(loaded)
        assert_alike(pruned(loaded, inputs), pruned(model, inputs))
        assert footprint(loaded) == before
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


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("when", ["before", "inside"])
def test_parts_dispatched_to_disk_before_or_inside_the_context_change_no_answer(
    name: str, when: str, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    row = BY_NAME[name]
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


@pytest.mark.slow
def test_an_adapted_model_is_pruned_as_the_model_it_merges_to(adapted: Any) -> None:
    model, inputs = adapted
    base, _ = random_blip2()
    before, found = footprint(model), pruned(model, inputs)
    assert footprint(model) == before
    (predicted,) = trainer(TokenPruning(HALF)).predict(Holder(model), loading([inputs]))
    with torch.no_grad(), prune(Holder(model), HALF):
        assert torch.equal(model.generate(**inputs, **SHORT), predicted)
    merged = model.merge_and_unload()
    assert (pruned(base, inputs)[0] - found[0]).abs().max() > 1, "adapters must move logits, or this proves nothing"
    assert_alike(found, pruned(merged, inputs), 1e-4)
    check_dropping_equals_masking(merged, inputs)


@pytest.mark.slow
def test_adapters_switched_off_and_on_inside_the_context_are_off_and_on(adapted: Any) -> None:
    model, inputs = adapted
    base, _ = random_blip2()
    expected = pruned(base, inputs)
    with torch.no_grad(), prune(model, HALF) as pruning:
        on = model(**inputs).logits
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected[0]) and torch.equal(pruning.keep, expected[2])
        assert torch.equal(model(**inputs).logits, on) and not torch.equal(on, expected[0])


def test_a_policy_of_the_base_model_is_accepted_by_the_adapted_one_and_refused_by_another_shape(adapted: Any) -> None:
    model, inputs = adapted
    policy = replace(HALF, model=find_family(random_blip2()[0]).describe())  # as a calibration writes it
    assert pruned(model, inputs, policy)[2].sum(1).tolist() == [4] * 3
    other, _ = random_blip2(shape=SHAPES["5 queries, every layer crosses"])
    with pytest.raises(PolicyError, match="The policy was made for blip-2 with 8 visual tokens"), prune(other, policy):
        pass


@pytest.mark.slow
def test_an_adapted_model_is_calibrated(adapted: Any, tmp_path: Path) -> None:
    check_calibrates(adapted[0], tmp_path)


@pytest.mark.slow
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
        fit.fit(module, loading([inputs]), loading([inputs]))
        weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        assert all(torch.equal(w, frozen[name]) for name, w in model.named_parameters() if name in frozen)
        found.append((weights, module, inputs))
    (alone, _, _), (beside, module, inputs) = found
    start = dict(lora(**settings)[0].named_parameters())
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert any(not torch.equal(alone[name], start[name]) for name in alone), "it must have trained"
    assert torch.equal(module.validated, pruned(module.net.eval(), inputs)[0])
