"""BLIP-2 models of several shapes, with every scorer: what the matrix of all families does not try."""

import warnings

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.calibration.plan import why_not
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.models import find_family
from tests.support.models import GREEDY, IMAGE, SHAPES, random_blip2
from tests.support.steps import difference, stepwise

pytestmark = pytest.mark.usefixtures("no_grad")


FAMILY = find_family(random_blip2()[0])
SHOWN = [
    name
    for name, scorer in SCORERS.items()
    if not scorer().stages(FAMILY.depth) and why_not(FAMILY, PruningPolicy(name)) is None
]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}  # of the logits' scale


def uneven(visual: Tensor) -> Tensor:
    """Each sample keeps another number of tokens, scattered over its placeholders."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(visual.shape, generator=generator)
    counts = torch.tensor([2, visual.shape[1] - 1, 3])[: len(visual), None]
    return scores.argsort(1).argsort(1) < counts


def oracle_mask(inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
    """The caller's mask with the same tokens masked out of the full prompt."""
    mask = inputs["attention_mask"].clone()
    mask[inputs["input_ids"] == IMAGE] = keep.flatten().to(mask.dtype)
    return mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) * mask - 1).long()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_dropping_equals_masking_in_prefill_and_ten_decoding_steps(shape: str, dtype: torch.dtype) -> None:
    model, inputs = random_blip2(shape=SHAPES[shape], dtype=dtype)
    full = model(**inputs).logits
    with prune(model, PruningPolicy(), choose=uneven) as pruning:
        prefill = model(**inputs).logits
        sequence, steps = stepwise(model, inputs, **GREEDY)
    assert pruning.keep.sum(1).tolist() == [2, SHAPES[shape].queries - 1, 3]
    mask = oracle_mask(inputs, pruning.keep)
    length, new = inputs["input_ids"].shape[1], sequence.shape[1] - inputs["input_ids"].shape[1]
    assert new == 10
    grow = lambda m: torch.cat([m, torch.ones(len(m), new, dtype=m.dtype)], 1)  # noqa: E731
    oracle = model(
        input_ids=sequence,
        attention_mask=grow(mask),
        position_ids=positions(grow(inputs["attention_mask"])),
        pixel_values=inputs["pixel_values"],
    ).logits
    scale = full.abs().max().item()
    seen = mask.bool()
    assert difference(prefill[seen], full[seen]) > 0.1 * scale, "dropping must move the logits, or this proves nothing"
    assert difference(prefill[seen], oracle[:, :length][seen]) <= TOLERANCE[dtype] * scale
    assert difference(steps, oracle[:, length - 1 : -1]) <= TOLERANCE[dtype] * scale
    dropped = (inputs["input_ids"] == IMAGE).clone()
    dropped[dropped.clone()] = ~pruning.keep.flatten()
    assert not prefill[dropped].any(), "rows that were dropped have no output, those that filled up a batch included"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keep_one_gives_the_logits_and_text_of_the_unpruned_model(attention: str) -> None:
    model, inputs = random_blip2(attention=attention)
    full, text = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    for keep in (1.0, 8):
        with prune(model, PruningPolicy(keep=keep)) as pruning:
            assert torch.equal(model(**inputs).logits, full)
            assert torch.equal(model.generate(**inputs, **GREEDY), text)
        assert pruning.keep.all() and pruning.keep.shape == (3, 8)
        assert (pruning.scores is None) == (keep == 1.0), "keep 1.0 scores nothing"


@pytest.mark.parametrize(
    ("scorer", "selector", "args"),
    [*((scorer, "top-k", {}) for scorer in SHOWN), ("catp", "dpp", {}), ("catp", "dpp", {"relevance": 0.0})],
)
def test_a_sample_does_not_depend_on_its_batch_or_padding(scorer: str, selector: str, args: dict[str, float]) -> None:
    model, inputs = random_blip2(dtype=torch.float64)
    policy = PruningPolicy(scorer=scorer, selector=selector, selector_args=args, keep=0.4)
    pads = torch.ones(3, 4, dtype=torch.long)
    padded = {  # four more pads between image and text
        "input_ids": torch.cat([inputs["input_ids"][:, :8], pads, inputs["input_ids"][:, 8:]], 1),
        "attention_mask": torch.cat([inputs["attention_mask"][:, :8], 0 * pads, inputs["attention_mask"][:, 8:]], 1),
        "pixel_values": inputs["pixel_values"],
    }
    with prune(model, policy) as pruning:
        together, keep = model(**inputs).logits[:, -1], pruning.keep
        with_pads, keep_padded = model(**padded).logits[:, -1], pruning.keep
        backwards = model(**{name: value.flip(0) for name, value in inputs.items()}).logits[:, -1].flip(0)
        assert torch.equal(pruning.keep.flip(0), keep) and torch.equal(keep_padded, keep)
        assert keep.sum(1).tolist() == [4, 4, 4]  # ceil(0.4 * 8)
        for row in range(3):
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits[:, -1]
            assert torch.equal(pruning.keep[0], keep[row])
            assert difference(alone[0], together[row]) < 1e-10
    assert difference(with_pads, together) < 1e-10 and difference(backwards, together) < 1e-10


def test_unpadded_prompts_that_keep_different_numbers_stay_exact() -> None:
    """generate turns an all-ones mask into None; the fillers of shorter samples must stay masked all the same."""
    model, inputs = random_blip2(dtype=torch.float64, padded=False)
    for given in (inputs, {name: value for name, value in inputs.items() if name != "attention_mask"}):
        with prune(model, PruningPolicy(), choose=uneven) as pruning:
            logits = model(**given).logits[:, -1]
            sequences, steps = stepwise(model, given, **GREEDY)
        mask = oracle_mask(inputs, pruning.keep)
        grown = torch.cat([mask, torch.ones(3, 10, dtype=torch.long)], 1)
        oracle = model(
            input_ids=sequences,
            attention_mask=grown,
            position_ids=torch.arange(grown.shape[1]).expand(3, -1),
            pixel_values=inputs["pixel_values"],
        ).logits
        assert difference(logits, oracle[:, -11]) < 1e-9
        assert difference(steps, oracle[:, -11:-1]) < 1e-9


def test_labels_for_the_last_columns_alone_give_the_loss_of_those_columns() -> None:
    model, inputs = random_blip2(dtype=torch.float64)
    labels = inputs["input_ids"].clone()
    with prune(model, PruningPolicy(), choose=uneven):
        short = model(**inputs, labels=labels[:, -6:]).loss
        labels[:, :-5] = -100  # the first of six has no column before it
        assert difference(short, model(**inputs, labels=labels).loss) < 1e-10


def test_bfloat16_is_finite_and_keeps_what_the_budget_says() -> None:
    model, inputs = random_blip2(dtype=torch.bfloat16)
    for scorer in SHOWN:
        with prune(model, PruningPolicy(scorer=scorer, keep=3)) as pruning:
            assert model(**inputs).logits.isfinite().all()
        assert pruning.keep.sum(1).tolist() == [3, 3, 3]


@pytest.mark.parametrize("per", ["image", "sample"])
def test_two_images_in_one_sample(per: str) -> None:
    """Features follow the order of placeholders, so a sample may hold two images; a budget is per image or sample."""
    model, inputs = random_blip2(dtype=torch.float64, batch=3)
    first = inputs["input_ids"][:2]
    two = torch.cat([first[:1, :8], first[:1]], 1)
    one = torch.cat([torch.full((1, 8), 1), first[1:]], 1)
    mask = torch.ones(2, two.shape[1], dtype=torch.long)
    mask[1, :8] = 0
    batch = {"input_ids": torch.cat([two, one]), "attention_mask": mask}
    # transformers' BLIP-2 lets features outnumber samples in forward
    policy = PruningPolicy(scorer="l2-norm", keep=0.5, selector_args={"per": per})
    with prune(model, policy) as pruning:
        model(**batch, pixel_values=inputs["pixel_values"])
    assert pruning.keep.shape == (2, 16)
    assert pruning.keep.sum(1).tolist() == [8, 4] and not pruning.keep[1, 8:].any()
    assert pruning.scores[1, 8:].eq(-torch.inf).all() and pruning.scores[0].isfinite().all()
    if per == "image":
        assert pruning.keep[0, :8].sum() == 4


def test_a_generated_image_token_is_text_like_any_other() -> None:
    model, inputs = random_blip2(dtype=torch.float64)

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([IMAGE]), 100.0)

    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "logits_processor": [force]}
    with prune(model, PruningPolicy(), choose=uneven) as pruning:
        text = model.generate(**inputs, **settings)
        again = model.generate(**inputs, **settings)
    assert text[:, -4:].eq(IMAGE).all() and torch.equal(text, again)
    assert pruning.prefills == 2, "only prompts are pruned"


@pytest.mark.parametrize(("keep", "told"), [(9, 1), (8, 0)])
def test_a_budget_of_more_tokens_than_there_are_warns_once_and_prunes_nothing(keep: int, told: int) -> None:
    model, inputs = random_blip2()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with prune(model, PruningPolicy("stride", keep=keep)) as pruning:
            model(**inputs)
            model(**inputs)
    assert pruning.keep is not None and bool(pruning.keep.all())
    found = [str(one.message) for one in caught]
    assert len([one for one in found if "keep is 9 tokens and the largest of these images has 8" in one]) == told


def test_parts_that_a_caller_runs_one_after_the_other_are_pruned_like_a_forward() -> None:
    model, inputs = random_blip2(dtype=torch.float64)
    policy = PruningPolicy("catp", keep=3)
    with torch.no_grad(), prune(model, policy) as pruning:
        expected = model(**inputs).logits
        keep = pruning.keep
    assert keep is not None
    with torch.no_grad(), prune(model, policy) as pruning:
        for _ in range(2):  # nothing of the first serves the second
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            features = model.get_image_features(inputs["pixel_values"]).pooler_output
            places = (inputs["input_ids"] == model.config.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(places, features)
            found = model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
            assert torch.equal(found, expected) and torch.equal(pruning.keep, keep)
        with pytest.raises(PruningError, match="without its token ids"):
            model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert pruning.prefills == 2
