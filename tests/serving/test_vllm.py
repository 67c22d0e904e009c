"""The plug-in against vLLM as it is installed: names, interfaces, and what its parts compute, without an engine."""

import inspect
from typing import Any

import pytest
import torch

from catp_lightning import PruningPolicy, prune
from catp_lightning.serving.vllm_plugin import ARCHITECTURES, register
from tests.support.families import BY_NAME
from tests.support.oracles import IMAGE

pytest.importorskip("vllm", reason="vLLM is not installed")
MODELS = pytest.importorskip("catp_lightning.serving.vllm_models", reason="this vLLM cannot be imported here")


def test_the_architectures_are_registered_once_however_often_vllm_asks() -> None:
    from vllm import ModelRegistry

    register()
    before = {name: ModelRegistry.models[name] for name in ARCHITECTURES}
    register()
    assert {name: ModelRegistry.models[name] for name in ARCHITECTURES} == before
    for name, model in before.items():
        assert model.load_model_cls() is getattr(MODELS, name)


def test_the_models_have_processors_of_their_own_and_the_interfaces_that_vllm_looks_for() -> None:
    from vllm.model_executor.models import interfaces

    for name in ARCHITECTURES:
        model = getattr(MODELS, name)
        assert interfaces.supports_multimodal(model)
        factories = model.__dict__["_processor_factory"]
        assert issubclass(factories.processor, MODELS._Shortened)
        qwen = "Qwen" in name
        assert bool(interfaces.supports_multimodal_pruning(model)) == qwen
        if not qwen:
            continue
        assert interfaces.supports_mrope(model)
        assert issubclass(factories.info, MODELS._ImagesOnly)
        for protocol, method in [
            (interfaces.SupportsMRoPE, "get_mrope_input_positions"),
            (interfaces.SupportsMultiModalPruning, "recompute_mrope_positions"),
        ]:
            published = list(inspect.signature(getattr(protocol, method)).parameters)
            assert list(inspect.signature(getattr(model, method)).parameters) == published


def test_an_image_is_replaced_by_as_many_placeholders_as_stay() -> None:
    from vllm.multimodal.processing import PromptReplacement

    def images(item: int) -> list[int]:
        return [IMAGE] * (100, 7)[item]

    whole = [PromptReplacement(modality=name, target=[IMAGE], replacement=images) for name in ("image", "video")]
    (update,) = MODELS.shortened(PruningPolicy("divprune", keep=0.25), whole)
    assert [len(update.resolve(item).content.full) for item in (0, 1)] == [25, 2]
    assert update.target == [IMAGE]


@pytest.mark.parametrize(
    ("row", "name"), [("Qwen2.5-VL", ARCHITECTURES[1]), ("Qwen3-VL", ARCHITECTURES[2])], ids=["2.5", "3"]
)
def test_rows_and_positions_of_qwen_are_those_that_prune_leaves(row: str, name: str) -> None:
    """Its own methods, on a model without weights: features come from transformers."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalFieldConfig, PlaceholderRange
    from vllm.multimodal.inputs import MultiModalFieldElem as Element
    from vllm.multimodal.inputs import MultiModalKwargsItem as Item

    model, inputs = BY_NAME[row].model(), BY_NAME[row].inputs(rows=[1])  # two images
    policy, grids = PruningPolicy("divprune", keep=0.4), inputs["image_grid_thw"]
    served: Any = bare(getattr(MODELS, name), model.config, policy)
    given = model.get_image_features(pixel_values=inputs["pixel_values"], image_grid_thw=grids)
    whole = [torch.cat(given.pooler_output)]
    if row == "Qwen3-VL":
        levels = given.deepstack_features  # vLLM hands these on beside the features
        whole += [level if isinstance(level, torch.Tensor) else torch.cat(level) for level in levels]
    channels = torch.zeros(len(whole[0]), 5)  # vLLM's own positions stand behind them
    images = torch.cat([*whole, channels], 1).split([len(part) for part in given.pooler_output])
    rows = [served._kept(image, *grid) for image, grid in zip(images, grids.tolist(), strict=True)]
    with prune(model, policy) as pruning:
        model(**inputs)
    assert pruning.keep is not None
    ids = inputs["input_ids"][0]
    stay = ids != IMAGE
    stay[~stay] = pruning.keep[0]
    kept = torch.cat(images)[pruning.keep[0]][:, :-5]
    torch.testing.assert_close(torch.cat(rows)[:, :-4], kept)

    element, at, features = MultiModalFieldConfig.batched("image").field, 0, []
    for image, grid in zip(rows, grids, strict=True):
        at = int((ids[stay][at:] == IMAGE).nonzero()[0]) + at
        data = Item({"image_grid_thw": Element(data=grid, field=element)})
        where = PlaceholderRange(offset=at, length=len(image))
        features.append(MultiModalFeatureSpec(data=data, modality="image", identifier=str(at), mm_position=where))
        at += len(image)
    expected, delta = model.model.get_rope_index(
        input_ids=ids[None], mm_token_type_ids=(ids == IMAGE).long()[None], image_grid_thw=grids
    )
    prompt = ids[stay].tolist()
    positions, shift = served.get_mrope_input_positions(prompt, features)
    cleaned, positions, again = served.recompute_mrope_positions(prompt, rows, positions, 0)
    assert positions.tolist() == expected[:, 0, stay].tolist()
    assert shift == again == int(delta) + len(ids) - len(prompt)
    torch.testing.assert_close(torch.cat(cleaned), kept)


def bare(kind: Any, config: Any, policy: PruningPolicy) -> Any:
    """A model of vLLM without its parts, which an engine and a GPU would be needed for."""
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model._take(config, policy)
    return model
