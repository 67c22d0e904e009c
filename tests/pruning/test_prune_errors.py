"""Nothing is silently unpruned, and whatever happens inside, the model is afterwards what it was."""

import re

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.models import find_family
from tests.support.families import ROWS
from tests.support.footprints import footprint
from tests.support.models import GREEDY, SHAPES, random_blip2
from tests.support.oracles import CACHE, IMAGE, cache_of
from tests.support.paths import ROOT
from tests.support.policies import CATP


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_an_exception_in_the_context_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    model, inputs = random_blip2()
    before, logits = footprint(model), model(**inputs).logits
    with pytest.raises(error), prune(model, CATP):
        assert footprint(model) != before
        model(**inputs)
        raise error("stop")
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(
    "place", ["vision_model", "qformer", "language_model.model.decoder.layers.1", "language_projection"]
)
def test_an_exception_inside_the_model_leaves_it_as_it_was_and_the_next_call_is_pruned(place: str) -> None:
    model, inputs = random_blip2()
    before = footprint(model)

    def fail(*args: object) -> None:
        raise RuntimeError("planted")

    with prune(model, CATP) as pruning:
        expected = model(**inputs).logits
        hook = model.get_submodule(place).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            model.generate(**inputs, **GREEDY)
        hook.remove()
        pruning.keep = None
        assert torch.equal(model(**inputs).logits, expected) and pruning.keep is not None
    assert footprint(model) == before


def test_an_entry_that_fails_changes_nothing() -> None:
    model, _ = random_blip2()
    before = footprint(model)
    wrong = PruningPolicy(scorer="catp", scorer_args={"layers": [0, 7]})
    with (
        pytest.raises(PruningError, match=r"layer 7 of cross-attention; this model has 2, numbered 0 to 1"),
        prune(model, wrong),
    ):
        pass
    assert footprint(model) == before


def test_pruning_does_not_nest_and_works_again_afterwards() -> None:
    model, inputs = random_blip2()
    with prune(model, CATP) as outer:
        with pytest.raises(PruningError, match="does not nest"), prune(nn.Sequential(model), CATP):
            pass
        model(**inputs)
        assert outer.keep is not None, "the outer context is still in force"
    with prune(model, CATP):
        model(**inputs)


def test_calls_that_cannot_be_pruned_say_so() -> None:
    model, inputs = random_blip2()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with prune(model, CATP), torch.no_grad():
        with pytest.raises(PruningError, match="inputs_embeds"):
            model.generate(
                pixel_values=inputs["pixel_values"], inputs_embeds=embeds, attention_mask=inputs["attention_mask"]
            )
        with pytest.raises(PruningError, match="static cache"):
            cache = StaticCache(config=model.language_model.config, max_cache_len=64)
            model(**inputs, **{CACHE: cache})
        with pytest.raises(PruningError, match="vision part"):
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        output = model(**inputs, use_cache=True).language_model_outputs
        stolen = DynamicCache(config=model.language_model.config)
        for index, layer in enumerate(cache_of(output).layers):
            stolen.update(layer.keys, layer.values, index)
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            model.language_model(input_ids=inputs["input_ids"][:, -1:], **{CACHE: stolen})
        mask = torch.ones(3, 1, 18, 18, dtype=torch.bool)
        with pytest.raises(PruningError, match=r"attention_mask is \(3, 1, 18, 18\)"):
            model(**{**inputs, "attention_mask": mask})


def test_placeholders_that_do_not_match_the_images_are_refused_however_they_are_given() -> None:
    """transformers would scatter the first sample's features into the second, or none at all, without a word."""
    model, inputs = random_blip2()
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    blind, one, moved = ids.masked_fill(ids == 99, 5), ids.clone(), ids.clone()
    one[1] = blind[1]
    moved[0, 6:8], moved[1, 8:10] = 5, 99
    policies = (CATP, PruningPolicy("stride", keep=1.0), PruningPolicy("stride", keep=2))
    for policy in policies:
        with prune(model, policy), torch.no_grad():
            for changed, counts in ((blind, [0, 0, 0]), (one, [8, 0, 8]), (moved, [6, 10, 8])):
                says = rf"given 3 images .* {re.escape(str(counts))} placeholders"
                with pytest.raises(PruningError, match=says):
                    model(**{**inputs, "input_ids": changed})
                with pytest.raises(PruningError, match=says):
                    model.generate(pixels, changed, mask, max_new_tokens=2)
            model.generate(pixels, ids, mask, max_new_tokens=2, num_beams=2)
            model(**inputs)


def test_text_without_an_image_runs_as_it_is() -> None:
    model, inputs = random_blip2()
    ids = inputs["input_ids"][:, -6:]
    plain = model.language_model.generate(ids, max_new_tokens=4, do_sample=False)
    with prune(model, CATP):
        assert torch.equal(model.language_model.generate(ids, max_new_tokens=4, do_sample=False), plain)


def test_a_policy_for_another_architecture_is_refused_by_name() -> None:
    model, inputs = random_blip2()
    other, _ = random_blip2(shape=SHAPES["12 queries, wider"])
    here = find_family(model).describe()
    assert here == {"type": "blip-2", "name": "", "visual_tokens": 8, "cross_attention_layers": 2, "heads": 4}
    policy = PruningPolicy(model={**here, "name": "one"})
    with (
        pytest.raises(
            PolicyError, match=r"made for blip-2 with 8 visual tokens.*this model is blip-2 with 12 visual tokens"
        ),
        prune(other, policy),
    ):
        pass
    model.name_or_path = str(ROOT / "tests")
    assert find_family(model).describe()["name"] == "tests", (
        "of a folder its name: where it lies differs between machines"
    )
    model.name_or_path = "two"
    with pytest.warns(UserWarning, match="checkpoint 'one' and is used on 'two'"), prune(model, policy):
        model(**inputs)


def test_many_contexts_leave_nothing_behind() -> None:
    model, inputs = random_blip2()
    before = footprint(model)
    for _ in range(10):
        with prune(model, CATP):
            pass
    assert footprint(model) == before
    with prune(model, CATP), pytest.raises(RuntimeError):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    assert footprint(model) == before


def test_an_answer_that_would_follow_a_dropped_token_is_refused() -> None:
    """A prompt that ends in an image, beside one that does not: without the row there is nothing to predict from."""
    row = next(row for row in ROWS if row.name == "Llava")
    model, inputs = row.model(), row.inputs([0])
    end = int((inputs["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1
    short = {**inputs, "input_ids": inputs["input_ids"][:, :end], "attention_mask": inputs["attention_mask"][:, :end]}
    settings = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [IMAGE]}
    with (
        torch.no_grad(),
        prune(
            model, PruningPolicy(), choose=lambda tokens: torch.arange(tokens.shape[1]).expand_as(tokens) < 3
        ) as pruning,
    ):
        model.generate(**inputs, **settings)  # text follows
        with pytest.raises(PruningError, match=r"The prompt of sample 0 ends in an image.*Choose that token too"):
            model.generate(**short, **settings)
        assert model(**short).logits.shape[1] == end, "a call that generates nothing says which rows it reads"
        model.generate(**inputs, **settings)
    assert pruning.keep is not None
