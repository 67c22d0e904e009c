"""Scorers on the families that show their signals: what is observed, and a choice that belongs to each sample alone."""

import math
import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.models import find_family
from catp_lightning.pruning.answers import compare_with_unpruned
from catp_lightning.pruning.pruner import applied
from tests.support.decoder_oracle import Decoder
from tests.support.families import BY_NAME
from tests.support.matrix import generate
from tests.support.oracles import IMAGE, VIDEO, cache_of
from tests.support.projector_models import llava_onevision, video
from tests.support.rows import Row
from tests.support.rules import RULES
from tests.support.samples import Sample, pictures, prompts, with_counts
from tests.support.small_configs import GATED, TOWER, clip

pytestmark = pytest.mark.usefixtures("no_grad")
QUICK = {"Llava", "Mllama", "Blip2-T5"}
"""One model of each kind, whose tests run by default."""


@pytest.mark.parametrize(
    ("name", "rule"),
    [pytest.param(name, rule, marks=() if name in QUICK else pytest.mark.slow) for name, rule in RULES],
)
def test_a_choice_belongs_to_the_sample_and_to_the_prompt(name: str, rule: dict[str, Any]) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs(range(len(row.samples())))
    settings = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    with prune(model, PruningPolicy(**{"keep": 0.4, **rule})) as pruning:
        model(**row.oracle.forward_inputs(inputs))
        keep, scores = pruning.keep, pruning.scores
        model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(pruning.keep, keep), "generate keeps what forward does, at every step"
        # Of a sample's several images older versions of generate give a beam the first one twice, unpruned as well.
        few = [own for own, sample in enumerate(row.samples()) if len(sample.images) < 2]
        model.generate(**row.inputs(few), **{**settings, "max_new_tokens": 1}, num_beams=2)
        assert torch.equal(pruning.keep, keep[few, : pruning.keep.shape[1]]), "before beams are expanded"
        for own in (0, 1):
            alone = row.inputs([own], pads=3)
            model(**row.oracle.forward_inputs(alone))
            width = pruning.keep.shape[1]
            assert torch.equal(pruning.keep[0], keep[own, :width]) and not keep[own, width:].any()
            torch.testing.assert_close(
                pruning.scores[0], scores[own, :width], rtol=1e-6, atol=1e-6
            )  # angles of positions are float32
    assert scores[keep].isfinite().all()


@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "LlavaOnevision", "VideoLlava", "Qwen2.5-VL", "Mistral3"])
def test_a_budget_is_of_each_image_and_frame(name: str) -> None:
    row = BY_NAME[name]
    model, samples = row.model(), row.samples()
    inputs = row.inputs(range(len(samples)))  # those without an image too
    with prune(model, PruningPolicy(scorer="stride", keep=0.3)) as pruning:
        model(**row.oracle.forward_inputs(inputs))
    for sample, keep in zip(samples, pruning.keep, strict=True):
        place = 0
        for image in sample.images:
            pixels, grid = (image.tensors.get(part) for part in ("pixel_values_videos", "video_grid_thw"))
            frames = 1 if pixels is None else len(pixels) if grid is None else int(grid[0])
            own = keep[place : place + image.tokens]
            place += image.tokens
            if name in ("LlavaNext", "LlavaOnevision"):
                assert 0.2 <= own.sum() / image.tokens <= 0.8, "line ends stay too"
                continue
            each, always = image.tokens // frames, int(name == "VideoLlava" and frames > 1)  # each frame's [CLS]
            assert own.sum() == frames * (math.ceil(0.3 * (each - always)) + always)


def test_tiles_of_one_run_are_one_image() -> None:
    def samples() -> list[Sample]:
        tiles = [image for sample in pictures(each=(1, 2, 1)) for image in sample]
        runs = [[0], [1, 2], [3]]  # the second sample has one image of two tiles
        return [
            Sample([5, 6, *[IMAGE] * 9 * len(run), *range(7, 12 + n)], [tiles[t] for t in run])
            for n, run in enumerate(runs)
        ]

    row = Row("InternVL, tiles", BY_NAME["InternVL"].make, samples, Decoder())
    kept = {}
    for per in ("image", "crop"):
        with prune(row.model(), PruningPolicy(scorer="stride", keep=1, selector_args={"per": per})) as pruning:
            row.model()(**row.inputs())
        kept[per] = pruning.keep.sum(1).tolist()
    assert kept == {"image": [1, 1, 1], "crop": [1, 2, 1]}


def test_pyramiddrop_drops_as_large_a_share_at_every_stage() -> None:
    row = BY_NAME["Llava"]
    inputs = row.inputs([number for number, sample in enumerate(row.samples()) if len(sample.images) == 1])
    rule = PruningPolicy(scorer="pyramiddrop", scorer_args={"stages_at": [1, 2]}, keep=2)
    with prune(row.model(), rule) as pruning:
        output = row.model()(**inputs, use_cache=True)
    full = inputs["input_ids"].shape[1]
    pads = inputs["attention_mask"].argmax(1).clamp(min=1) - 1  # but one, padding on the left leaves too
    held = [layer.keys.shape[2] for layer in cache_of(output).layers]
    text = full - 9 - int(pads.min())
    assert held == [full, text + 5, text + 2]  # 9 tokens, ceil(sqrt(9 * 2)), 2
    assert pruning.keep.sum(1).unique().tolist() == [2]


def test_a_loop_by_hand_without_position_ids_is_right_in_qwen_where_the_plain_model_fails() -> None:
    row = BY_NAME["Qwen2.5-VL"]
    model, inputs = row.model(), row.inputs()
    with prune(model, PruningPolicy(scorer="stride", keep=0.4)):
        tokens, steps = generate(row, model, inputs)
        looped = torch.stack([*row.oracle.loop(model, inputs, tokens, False)], 1)
    torch.testing.assert_close(looped, steps, rtol=0, atol=1e-10 * steps.abs().max().item())


def test_line_ends_of_llava_next_always_stay_and_crops_share_evenly() -> None:
    row = BY_NAME["LlavaNext"]
    model, inputs = row.model(), row.inputs(range(len(row.samples())))
    kept = {}
    for per in ("image", "crop", "sample"):
        with prune(model, PruningPolicy(scorer="stride", keep=1, selector_args={"per": per})) as pruning:
            model(**inputs)
        kept[per] = pruning.keep
    rows: list[Tensor] = []
    hook = find_family(model).decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    placeholders, ends = inputs["input_ids"] == IMAGE, torch.zeros_like(kept["image"])
    valid = torch.arange(ends.shape[1]) < placeholders.sum(1)[:, None]
    ends[valid] = (rows[0][placeholders] == model.model.image_newline).all(-1)
    assert ends.any() and all((keep | ~ends).all() for keep in kept.values())
    droppable = {per: (keep & ~ends).sum(1) for per, keep in kept.items()}
    images = torch.tensor([len(sample.images) for sample in row.samples()])
    assert torch.equal(droppable["image"], images) and torch.equal(droppable["sample"], images.clamp(max=1))
    assert (droppable["crop"] >= 2 * images).all(), "the whole picture and its crops keep one each"


@pytest.mark.parametrize("name", ["Llava", "LlavaOnevision"])
def test_fastervlm_scores_are_the_vision_towers_attention(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(attention="eager"), row.inputs()
    with prune(model, PruningPolicy(scorer="fastervlm", keep=0.5)) as pruning:
        model(**row.oracle.forward_inputs(inputs))
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    pixels = inputs["pixel_values"]
    if name == "Llava":
        maps = tower(pixels, output_attentions=True).attentions[layer]
        expected = maps[:, :, 0, 1:].sum(1).flatten()
        mine = pruning.scores[pruning.scores.isfinite()]
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
        return
    first = pixels[0, :1]  # of a single image, the whole picture comes first and is not resampled
    received = tower(first, output_attentions=True).attentions[layer].mean(2).sum(1)[0]
    torch.testing.assert_close(pruning.scores[0, : len(received)], received, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tower", "tokens"), [("clip", 10), ("siglip", 8)])
def test_scores_belong_to_the_patches_that_are_tokens(tower: str, tokens: int) -> None:
    """LLaVA may take a tower's [CLS] for a token, and may leave out the first patch of a tower that has none."""
    full = tower == "clip"
    vision = clip() if full else hf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    strategy = "full" if full else "default"

    def make() -> hf.PreTrainedModel:
        return hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=vision,
                text_config=hf.LlamaConfig(**GATED),
                image_token_index=IMAGE,
                vision_feature_select_strategy=strategy,
            )
        )

    row = Row(f"{tower} {strategy}", make, lambda: prompts(pictures(tokens)), Decoder())
    model, inputs = row.model(torch.float32, "eager"), row.inputs(dtype=torch.float32)
    with prune(model, PruningPolicy(scorer="fastervlm", keep=0.3)) as pruning:
        model(**inputs)
    maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2]
    paid = maps[:, :, 0].sum(1) if full else maps.mean(2).sum(1)[:, 1:]
    if full:
        paid[:, 0] = 0
        assert pruning.keep[:, 0].all(), "[CLS] stands for no patch and always stays"
    torch.testing.assert_close(pruning.scores[pruning.scores.isfinite()], paid.flatten(), rtol=0, atol=1e-6)


def test_the_newline_of_a_video_of_one_frame_stays() -> None:
    row = Row("one frame", llava_onevision, lambda: prompts([[video(5, 1, 24, 0)]]), Decoder(), with_counts)
    with prune(row.model(), PruningPolicy(scorer="position", keep=0.3)) as pruning:
        row.model()(**row.inputs())
    assert pruning.keep.tolist() == [[True, True, False, False, True]]  # ceil(0.3 * 4), and the newline


def test_the_record_is_of_the_last_prefill_even_where_it_has_no_image() -> None:
    for name in ("Llava", "Mllama"):
        row = BY_NAME[name]
        with prune(row.model(), PruningPolicy(scorer="l2-norm", keep=0.5)) as pruning:
            row.model()(**row.inputs())
            assert pruning.keep.any()
            row.model()(input_ids=torch.full((1, 6), 5), attention_mask=torch.ones(1, 6, dtype=torch.long))
            assert len(pruning.keep) == 1 and not pruning.keep.any() and pruning.prefills == 2


def test_nothing_of_a_call_is_held_after_it() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    with prune(model, PruningPolicy(scorer="fastervlm", keep=0.5)):
        pixels = inputs["pixel_values"].clone()
        held = weakref.ref(pixels)
        model(**{**inputs, "pixel_values": pixels})
        del pixels
        assert held() is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "short"), [("Blip2-T5", False), ("Llava", False), ("Llava", True), ("Mllama", False)])
def test_answers_of_a_forward_step_are_compared_with_the_unpruned_models(name: str, short: bool) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs()
    labels = row.oracle.labels(inputs) if name == "Blip2-T5" else None
    settings = {"labels": labels} if labels is not None else {"logits_to_keep": 1} if short else {}
    place = 0 if name == "Blip2-T5" else -1
    unpruned = model(**inputs, **settings).logits[:, place].argmax(-1)
    with applied(model, PruningPolicy(scorer="stride", keep=0.2)) as pruner:
        pruned = model(**inputs, **settings).logits[:, place].argmax(-1)
        with compare_with_unpruned(pruner) as comparison:
            model(**inputs, **settings)
            if short:
                with pytest.raises(PruningError, match="asked for the last 1 rows of logits"):
                    model(**{**inputs, "attention_mask": inputs["attention_mask"].flip(1)}, **settings)
    assert comparison.same[0].tolist() == (pruned == unpruned).tolist()


def test_fastv_drops_from_its_layer_on_and_the_cache_says_so() -> None:
    row = BY_NAME["Llava"]
    model = row.model()
    inputs = row.inputs([number for number, sample in enumerate(row.samples()) if len(sample.images) == 1])
    with prune(model, PruningPolicy(scorer="fastv", scorer_args={"layer": 2}, keep=0.4)) as pruning:
        output = model(**inputs, use_cache=True)
    lengths = [layer.keys.shape[2] for layer in cache_of(output).layers]
    full, kept = inputs["input_ids"].shape[1], int(pruning.keep.sum(1).max())
    assert lengths == [full, full, full - 9 + kept] and kept == 4  # ceil(0.4 * 9)
