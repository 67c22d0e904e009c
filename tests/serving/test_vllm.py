"""The plug-in against vLLM as it is installed: names, interfaces, and what its parts compute, without an engine."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import catp_lightning.data
from catp_lightning import PruningPolicy, prune
from catp_lightning.serving import kept_count
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


def saved_qwen(folder: Path) -> Path:
    """Write a small Qwen2.5-VL with a processor, as vLLM reads it, but without weights."""
    marks = ["<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = {word: number for number, word in enumerate(["<unk>", *marks, *"abcdef"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=marks).save_pretrained(folder)
    pixels = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 100000}}
    kinds = {"preprocessor": "image_processor", "video_preprocessor": "video_processor"}
    for file, kind in kinds.items():
        own = {f"{kind}_type": f"Qwen2VL{'Image' if kind[0] == 'i' else 'Video'}Processor", **pixels}
        (folder / f"{file}_config.json").write_text(json.dumps(own))
    config = BY_NAME["Qwen2.5-VL"].make().config
    config.update({"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 2, "vision_end_token_id": 3})
    config.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_vllm_finds_the_architecture_by_its_overrides_and_its_processor_makes_room(tmp_path: Path, kind: str) -> None:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    register()
    qwen = kind == "qwen2_5_vl"
    name, positions = (ARCHITECTURES[1], "original") if qwen else (ARCHITECTURES[0], "compact")
    folder = saved_qwen(tmp_path) if qwen else Path(catp_lightning.data.__file__).parent / "digits_llava"
    policy = PruningPolicy("divprune", keep=0.25, positions=positions)
    policy.save(tmp_path / "policy.json")
    overrides = {"architectures": [name], "catp_policy": str(tmp_path / "policy.json")}
    config = ModelConfig(str(folder), dtype="float32", hf_overrides=overrides, video_pruning_rate=0.5 if qwen else None)
    assert config.architecture == name
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    assert processor.info.supported_mm_limits == {"image": None}
    image = Image.fromarray(np.zeros((48, 96, 3), dtype=np.uint8))
    items = processor.info.parse_mm_data({"image": [image, image.resize((32, 32))]})
    token = config.hf_config.image_token_id
    prompt = [6, token, 7, 8, token, 9]
    made = processor.apply(ProcessorInputs(prompt, mm_data_items=items), TimingContext(enabled=False))
    if qwen:
        whole = [int(item["image_grid_thw"].data.prod()) // 4 for item in made["mm_kwargs"]["image"]]
        assert whole[0] > whole[1]
    else:
        whole = [(config.hf_config.vision_config.image_size // config.hf_config.vision_config.patch_size) ** 2] * 2
    stay = [kept_count(policy, tokens) for tokens in whole]
    assert [where.length for where in made["mm_placeholders"]["image"]] == stay
    assert made["prompt_token_ids"] == [6, *[token] * stay[0], 7, 8, *[token] * stay[1], 9]
