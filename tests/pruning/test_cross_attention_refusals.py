"""Llama-3.2-Vision: what cannot be dropped is refused, and the model is afterwards what it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MllamaForConditionalGeneration, StaticCache
from transformers.cache_utils import DynamicLayer

from catp_lightning.errors import PruningError
from catp_lightning.methods.selection import Selection
from catp_lightning.models.mllama import Mllama
from catp_lightning.pruning.sites.cross_attention import PruneCrossAttention
from tests.support.cross_attended import (
    CASES,
    LENGTH,
    ROWS,
    TILES,
    cross_cache,
    dropping,
    generate,
    inputs_of,
    model_of,
    uneven,
)
from tests.support.footprints import footprint
from tests.support.oracles import CACHE, cache_of
from tests.support.steps import difference

pytestmark = pytest.mark.usefixtures("no_grad")


def test_inactive_it_leaves_the_model_alone_and_afterwards_nothing_stays() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES["image in the middle"])
    before, plain = footprint(model), generate(model, inputs)
    with dropping(model, uneven) as rows:
        assert footprint(model) != before
        pruned = generate(model, inputs)[1]
        rows.active = False
        output, steps = generate(model, inputs)
        rows.active = True
        assert torch.equal(steps, plain[1]) and cross_cache(output) == cross_cache(plain[0])
        assert torch.equal(generate(model, inputs)[1], pruned) and difference(pruned, steps) > 0.1
    assert footprint(model) == before and torch.equal(generate(model, inputs)[1], plain[1])


@pytest.mark.parametrize("where", ["choose", "a layer after the choice", "the caller"])
def test_after_an_exception_the_model_is_what_it_was(where: str) -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES["image in the middle"])
    before, full = footprint(model), model(**inputs).logits

    def fail(*args: Any) -> Any:
        raise KeyError("on purpose")

    last = model.model.language_model.layers[-1].mlp
    with pytest.raises(KeyError, match="on purpose"):
        choose = fail if where == "choose" else uneven
        with dropping(model, choose) as rows:
            if where == "a layer after the choice":
                handle = last.register_forward_hook(fail)
                with pytest.raises(KeyError):
                    model(**inputs)
                handle.remove()
                assert difference(model(**inputs).logits, full) > 0.1, "the next call is pruned again"
                rows.active = False
                assert torch.equal(model(**inputs).logits, full)
            if where == "choose":
                model(**inputs)
            fail()
    assert footprint(model) == before and torch.equal(model(**inputs).logits, full)


class TestRefused:
    """What cannot be exact raises an error that says what to do, and the model goes on afterwards."""

    @pytest.fixture
    def model(self) -> Iterator[MllamaForConditionalGeneration]:
        model, inputs = model_of(torch.float64), inputs_of(CASES["two images apart"])
        full, before = model(**inputs).logits, footprint(model)
        self.inputs, self.sees = inputs, inputs["cross_attention_mask"]
        with dropping(model, uneven) as self.rows:
            pruned = model(**inputs).logits
            yield model
            assert torch.equal(model(**inputs).logits, pruned)
        assert footprint(model) == before and torch.equal(model(**inputs).logits, full)

    def grown(self, column: int) -> Tensor:
        """The mask with a row more, which sees what another one does."""
        return torch.cat([self.sees, self.sees[:, [column]]], 1)

    def step(self, model: nn.Module, cache: Any, **changes: Any) -> Any:
        mask = torch.ones(2, LENGTH + 1, dtype=torch.long)
        given = {"attention_mask": mask, "cross_attention_mask": self.grown(-1), CACHE: cache, **changes}
        return model(input_ids=torch.tensor([[5], [6]]), **given)

    def test_a_static_cache(self, model: nn.Module) -> None:
        with pytest.raises(PruningError, match="static cache"):
            model(**self.inputs, **{CACHE: StaticCache(model.config.text_config, max_cache_len=300)})

    def test_a_cache_of_other_layers(self, model: nn.Module) -> None:
        class Own(DynamicLayer):
            pass

        cache = DynamicCache(config=model.config.text_config)
        cache.layers[1] = Own()
        with pytest.raises(PruningError, match="cache of Own cannot be pruned"):
            model(**self.inputs, **{CACHE: cache})

    def test_a_cache_that_was_filled_unpruned(self, model: nn.Module) -> None:
        self.rows.active = False
        cache = cache_of(model(**self.inputs, use_cache=True))
        self.rows.active = True
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            self.step(model, cache)

    def test_a_cache_of_an_earlier_prompt(self, model: nn.Module) -> None:
        cache = cache_of(model(**self.inputs, use_cache=True))
        model(**self.inputs, use_cache=True)
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            self.step(model, cache)

    def test_a_cache_of_an_earlier_context(self, model: nn.Module) -> None:
        rows = PruneCrossAttention(Mllama(model), lambda prompt: Selection(uneven(prompt)))
        self.rows.active = False
        with rows.installed():
            cache = cache_of(model(**self.inputs, use_cache=True))
        with rows.installed(), pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            self.step(model, cache)
        self.rows.active = True

    def test_a_cache_that_was_cropped(self, model: nn.Module) -> None:
        cache = cache_of(model(**self.inputs, use_cache=True))
        cache.crop(-1)
        with pytest.raises(PruningError, match="or was changed since"):
            self.step(model, cache)

    def test_an_image_on_top_of_a_pruned_cache(self, model: nn.Module) -> None:
        cache = cache_of(model(**self.inputs, use_cache=True))
        with pytest.raises(PruningError, match="cannot be added"):
            images = {name: self.inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
            self.step(model, cache, **images)

    def test_a_call_without_cross_attention_mask(self, model: nn.Module) -> None:
        with pytest.raises(PruningError, match="without cross_attention_mask"):
            model(**{**self.inputs, "cross_attention_mask": None})
        cache = cache_of(model(**self.inputs, use_cache=True))
        with pytest.raises(PruningError, match="extended by its last row at every decoding step"):
            self.step(model, cache, cross_attention_mask=None)

    @pytest.mark.parametrize("column", [0, 4], ids=["nothing", "the first image"])
    def test_a_decoding_step_that_sees_what_the_prompt_did_not_at_its_end(self, model: nn.Module, column: int) -> None:
        cache = cache_of(model(**self.inputs, use_cache=True))
        with pytest.raises(PruningError, match="sees other tiles than the last row"):
            self.step(model, cache, cross_attention_mask=self.grown(column))

    def test_a_choice_without_the_image_that_the_answer_reads(self, model: nn.Module) -> None:
        decide = self.rows.decide
        first = torch.arange(2 * TILES * ROWS) < TILES * ROWS
        self.rows.decide = lambda prompt: Selection(prompt.tokens & first[: prompt.tokens.shape[1]])
        with pytest.raises(PruningError, match="at least one row of every image"):
            model(**self.inputs)
        self.rows.decide = decide
