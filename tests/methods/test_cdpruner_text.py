"""CDPruner with CLIP's text encoder: relevance as its authors compute it, against CLIP's own features."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.models import find_family
from catp_lightning.pruning.refusals import refuse_fallback, refuse_routes
from catp_lightning.pruning.text_tower import TextTower
from tests.support.clips import TURN, Pair, cosines, own_tokenizer, pair, small_clip
from tests.support.families import BY_NAME
from tests.support.footprints import everything_of
from tests.support.oracles import IMAGE, PAD, Inputs
from tests.support.samples import Sample

pytestmark = pytest.mark.usefixtures("no_grad")
ROW = BY_NAME["Llava"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair("Llava", tmp_path_factory.mktemp("llava"))


def policy(own: Pair, keep: Any = 4, selector_args: dict[str, Any] | None = None, **args: Any) -> PruningPolicy:
    return PruningPolicy("cdpruner", {**own.args, **args}, selector_args=selector_args or {}, keep=keep)


def words_after_images(ids: Sequence[int]) -> list[int]:
    after = list(ids)[list(ids).index(IMAGE) :] if IMAGE in ids else list(ids)
    return [word for word in after if word not in (IMAGE, PAD, TURN)]


def stretched(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


def inputs_of(samples: list[Sample], pads: int = 0) -> Inputs:
    return replace(ROW, samples=lambda: samples).inputs(range(len(samples)), pads)


@pytest.mark.parametrize(("formula", "sign"), [("code", -1), ("paper", 1)])
def test_relevance_is_the_cosine_of_patch_and_text_in_clips_space(llava: Pair, formula: str, sign: int) -> None:
    inputs = ROW.inputs(range(4), pads=2)
    llava.model(**inputs)  # transformers sets hooks of its own, which stay
    before, weights = everything_of(llava.model), [weight.clone() for weight in llava.model.parameters()]
    with prune(llava.model, policy(llava, formula=formula)) as pruning:
        llava.model(**inputs)
    assert everything_of(llava.model) == before
    assert all(map(torch.equal, weights, llava.model.parameters()))
    pixels = iter(inputs["pixel_values"])
    for place, sample in enumerate(ROW.samples()):
        words, start = words_after_images(sample.ids), 0
        for _ in sample.images:
            cosine = cosines(llava, next(pixels)[None], words)[0]
            assert cosine.max() - cosine.min() > 0.1
            expected = stretched(sign * cosine)
            torch.testing.assert_close(pruning.scores[place, start : start + 9], expected, rtol=0, atol=1e-10)
            start += 9
    assert pruning.keep.sum(1).tolist() == [4, 8, 4, 0]


@pytest.mark.parametrize("count", [75, 76, 77, 200])
def test_a_long_text_is_cut_into_segments_of_77_tokens(llava: Pair, count: int) -> None:
    first = ROW.samples()[0]
    long = Sample([5, 6, *[IMAGE] * 9, TURN, *[3 + word * 11 % 80 for word in range(count)]], first.images)
    inputs = inputs_of([long, ROW.samples()[1]])
    with prune(llava.model, policy(llava)) as pruning:
        llava.model(**inputs)
    expected = stretched(-cosines(llava, inputs["pixel_values"][:1], words_after_images(long.ids))[0])
    torch.testing.assert_close(pruning.scores[0, :9], expected, rtol=0, atol=1e-10)


def test_text_before_the_images_counts_if_none_is_after_them_and_no_text_tells_nothing(llava: Pair) -> None:
    first = ROW.samples()[0]
    inputs = inputs_of([Sample([5, 6, 7, *[IMAGE] * 9], first.images), Sample([IMAGE] * 9, first.images)])
    with prune(llava.model, policy(llava)) as pruning:
        llava.model(**inputs)
    expected = stretched(-cosines(llava, inputs["pixel_values"][:1], [5, 6, 7])[0, :8])  # the last row always stays
    torch.testing.assert_close(pruning.scores[0, :8], expected, rtol=0, atol=1e-10)
    assert pruning.scores[1].tolist() == [1.0] * 9


def test_a_class_token_that_is_read_has_no_relevance_and_stays(llava: Pair) -> None:
    full, first = replace(llava, model=deepcopy(llava.model)), ROW.samples()[0]
    full.model.config.vision_feature_select_strategy = "full"
    inputs = inputs_of([Sample([5, *[IMAGE] * 10, 7, 8], first.images)])
    with prune(full.model, policy(full, 3)) as pruning:
        full.model(**inputs)
    expected = stretched(-cosines(llava, inputs["pixel_values"], [7, 8])[0])
    torch.testing.assert_close(pruning.scores[0, 1:], expected, rtol=0, atol=1e-10)
    assert pruning.keep[0, 0] and pruning.keep.sum() == 4


def test_in_half_precision_it_is_computed_in_float32(llava: Pair) -> None:
    half, inputs = replace(llava, model=deepcopy(llava.model).bfloat16()), ROW.inputs([0], dtype=torch.bfloat16)
    with prune(half.model, policy(half)) as pruning, torch.autocast("cpu", torch.bfloat16):
        half.model(**inputs)
    expected = stretched(-cosines(llava, inputs["pixel_values"].double(), words_after_images(ROW.samples()[0].ids))[0])
    assert pruning.scores.dtype == torch.float32
    torch.testing.assert_close(pruning.scores[0].double(), expected, rtol=0, atol=0.05)


def test_each_crop_of_llava_next_has_its_own_relevance_and_budget(tmp_path: Path) -> None:
    row, own = BY_NAME["LlavaNext"], pair("LlavaNext", tmp_path)
    inputs, sample = row.inputs([0]), row.samples()[0]
    with prune(own.model, policy(own, 2, {"per": "crop"})) as pruning:
        own.model(**inputs)
    cosine = cosines(own, inputs["pixel_values"][0], words_after_images(sample.ids))  # [crops, patches]
    model, ends = own.model.model, torch.tensor([torch.inf], dtype=torch.float64)
    packed = model.pack_image_features([cosine[..., None]], inputs["image_sizes"], "default", ends)[0][0][:, 0]
    patches = packed.isfinite()
    assert len(packed) == sample.images[0].tokens and 0 < (~patches).sum() < 4
    expected = stretched(-packed[patches])
    torch.testing.assert_close(pruning.scores[0][patches], expected, rtol=0, atol=1e-10)
    assert pruning.keep[0, ~patches].all() and pruning.keep[0, :4].sum() == 2, "line ends, and the picture of the whole"


def test_a_choice_belongs_to_the_prompt(llava: Pair) -> None:
    inputs = ROW.inputs(range(4), pads=1)
    with prune(llava.model, policy(llava)) as pruning:
        llava.model(**inputs)
        keep, scores = pruning.keep, pruning.scores
        for settings in ({"use_cache": False}, {"num_beams": 2}):
            llava.model.generate(**inputs, **settings, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE])
            assert torch.equal(pruning.keep, keep)
            torch.testing.assert_close(pruning.scores, scores, rtol=0, atol=1e-12)
    plain = PruningPolicy("cdpruner", keep=4)
    with prune(llava.model, plain) as pruning:
        llava.model(**inputs)
    assert not torch.allclose(pruning.scores[:3], scores[:3], atol=0.1), "word embeddings say something else"


def test_policies_hold_the_name_alone_and_word_embeddings_stay_the_default(llava: Pair, tmp_path: Path) -> None:
    policy(llava).save(tmp_path / "policy.json")
    assert PruningPolicy.load(tmp_path / "policy.json").scorer_args == llava.args
    assert PruningPolicy("cdpruner").build_scorer() == PruningPolicy("cdpruner", {"text_encoder": None}).build_scorer()
    for args, says in (({"text_encoder": ""}, "empty"), ({"formula": "paper"}, "setting of text_encoder")):
        with pytest.raises(PolicyError, match=says):
            PruningPolicy("cdpruner", args)


@pytest.mark.parametrize("name", ["VipLlava", "LlavaNextVideo", "LlavaOnevision", "VideoLlava", "Qwen2.5-VL", "Mllama"])
def test_models_that_do_not_project_patches_of_one_clip_tower_are_refused(llava: Pair, name: str) -> None:
    with pytest.raises(PruningError, match=r"LLaVA-1\.5 and LLaVA-NeXT with CLIP do") as refused:
        prune(BY_NAME[name].model(), policy(llava)).__enter__()
    assert "The scorers that work" not in str(refused.value)


def refusal(own: Pair, folder: Path) -> str:
    with pytest.raises(PruningError) as refused:
        TextTower(find_family(own.model), str(folder))
    return str(refused.value)


def test_what_is_no_clip_of_the_models_tower_is_refused(llava: Pair, tmp_path: Path) -> None:
    assert "cannot be loaded" in refusal(llava, tmp_path / "nothing")
    hf.SiglipConfig().save_pretrained(tmp_path / "siglip")
    assert "is a 'siglip'; a text_encoder is a whole CLIP" in refusal(llava, tmp_path / "siglip")
    vision = llava.model.config.vision_config.to_dict()
    small_clip({**vision, "patch_size": 12}).save_pretrained(tmp_path / "other")
    assert "has patch_size 12, the model's vision tower 8" in refusal(llava, tmp_path / "other")
    llava.clip.config.save_pretrained(tmp_path / "half")
    half = {name: weight for name, weight in llava.clip.state_dict().items() if not name.startswith("text")}
    save_file(half, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    assert "it is no whole CLIP" in refusal(llava, tmp_path / "half")
    small_clip(vision).save_pretrained(tmp_path / "wordless")
    assert "wordless' has no tokenizer. Save the CLIP's" in refusal(llava, tmp_path / "wordless")


def test_weights_that_are_pickled_are_not_loaded(llava: Pair, tmp_path: Path) -> None:
    llava.clip.config.save_pretrained(tmp_path)
    torch.save(llava.clip.state_dict(), tmp_path / "pytorch_model.bin")
    assert "must be safetensors" in refusal(llava, tmp_path)


def test_a_model_without_a_tokenizer_is_refused_with_what_to_do(llava: Pair, tmp_path: Path) -> None:
    known = llava.model.name_or_path
    try:
        llava.model.name_or_path = ""
        assert "load the model with from_pretrained, or set model.name_or_path" in refusal(llava, llava.folder)
        llava.model.name_or_path = str(tmp_path)
        assert "set it to one that has its tokenizer" in refusal(llava, llava.folder)
    finally:
        llava.model.name_or_path = known


def test_it_takes_no_other_rules_place(llava: Pair) -> None:
    divprune = PruningPolicy("divprune").method()
    with pytest.raises(PruningError, match="a fallback has not"):
        refuse_fallback(divprune, policy(llava).method(), find_family(llava.model))
    with pytest.raises(PruningError, match="read no other model"):
        refuse_routes(policy(llava).method(), 3)


def test_a_tower_with_other_weights_is_told(llava: Pair, tmp_path: Path) -> None:
    row = ROW.model()
    own_tokenizer().save_pretrained(tmp_path)
    try:
        row.name_or_path = str(tmp_path)
        with pytest.warns(UserWarning, match="has other weights than the vision tower of LlavaForConditionalGen"):
            prune(row, policy(llava)).__enter__()
    finally:
        row.name_or_path = ""
