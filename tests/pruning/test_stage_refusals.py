"""What cannot be pruned inside the decoder is refused."""

import re

import pytest
import torch

from catp_lightning import PruningError
from catp_lightning.models import find_family
from catp_lightning.pruning.sites import SiteSettings
from catp_lightning.pruning.sites.decoder_layers import PruneAtDecoderLayers
from tests.support.footprints import footprint
from tests.support.matrix import generate
from tests.support.oracles import CACHE, cache_of
from tests.support.rows import Row
from tests.support.stages import LLAMA, MISTRAL, Uneven, every_model, makes_positions, model_of, stages_of

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("stages", [(), (0,), (4,), (-1,), (2, 1), (1, 1), (1, 9)], ids=str)
def test_layers_that_do_not_exist_or_descend_are_refused(stages: tuple[int, ...]) -> None:
    with pytest.raises(PruningError, match=rf"at the layers {re.escape(str(list(stages)))}.*from 1 to 3"):
        stages_of(model_of(LLAMA), stages, Uneven())


def test_compact_positions_are_refused() -> None:
    with pytest.raises(PruningError, match="layers before it have used the positions"):
        PruneAtDecoderLayers(find_family(model_of(LLAMA)), Uneven(), SiteSettings((2,), compact=True))


def test_layers_of_another_kind_are_refused() -> None:
    family = find_family(LLAMA.make())
    family.decoder_config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(PruningError, match="layers of type linear_attention"):
        PruneAtDecoderLayers(family, Uneven(), SiteSettings((2,)))


@pytest.mark.parametrize("setting", ["num_kv_shared_layers", "hidden_size_per_layer_input"])
def test_layers_that_read_more_than_the_rows_before_them_are_refused(setting: str) -> None:
    family = find_family(LLAMA.make())
    setattr(family.decoder_config, setting, 2)
    with pytest.raises(PruningError, match="LlamaModel read keys that earlier layers cached, or embeddings"):
        PruneAtDecoderLayers(family, Uneven(), SiteSettings((2,)))


def test_flex_attention_is_refused() -> None:
    model = LLAMA.make()
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(PruningError, match=r"flex_attention.*eager, sdpa"):
        stages_of(model, (2,), Uneven())


@every_model
@pytest.mark.usefixtures("what_a_family_lacks")
def test_a_static_cache_is_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    model(**inputs)  # transformers sets hooks of its own in the first call, which stay
    before = footprint(model)
    with stages_of(model, (1, 3), Uneven()).installed(), pytest.raises(PruningError, match="static cache"):
        generate(row, model, inputs, cache_implementation="static")
    assert footprint(model) == before


@every_model
def test_embeddings_without_ids_are_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    model(**inputs)  # Qwen's keeps offsets of the last prompts' positions, and fails where there were others in number
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with stages_of(model, (1, 3), Uneven()).installed(), pytest.raises(PruningError, match="inputs_embeds"):
        model(**{**inputs, "input_ids": None}, inputs_embeds=embeddings)


@makes_positions
def test_caches_of_other_prompts_and_cut_caches_are_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    token, decode = inputs["input_ids"][:, -1:], model.get_submodule(row.oracle.stepper)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    plain = cache_of(model(**inputs, use_cache=True))
    with stages_of(model, (1, 3), Uneven()).installed():
        first, second = (cache_of(model(**inputs, use_cache=True)) for _ in range(2))
        for cache in (plain, first):
            with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
                decode(input_ids=token, attention_mask=mask, **{CACHE: cache})
        decode(input_ids=token, attention_mask=mask, **{CACHE: second})
        if not any(layer.is_sliding for layer in second.layers):  # those cannot be cut
            second.crop(2 - second.get_seq_length())  # rows of the image as well
            with pytest.raises(PruningError, match="changed since"):
                decode(input_ids=token, attention_mask=mask[:, :3], **{CACHE: second})
        third = cache_of(model(**inputs, use_cache=True))
        model.get_submodule(row.oracle.stepper)(input_ids=token)  # text alone
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            decode(input_ids=token, attention_mask=mask, **{CACHE: third})


@pytest.mark.parametrize("row", [LLAMA, MISTRAL], ids=repr)
def test_an_image_after_what_is_cached_already_is_refused(row: Row) -> None:
    model, inputs = model_of(row), row.inputs([0])
    with stages_of(model, (1, 3), Uneven()).installed():
        for before in ({"input_ids": inputs["input_ids"][:, :2]}, inputs):  # text alone, and a pruned prompt
            cache = cache_of(model(**before, use_cache=True))
            mask = torch.ones(1, cache.get_seq_length() + inputs["input_ids"].shape[1], dtype=torch.long)
            with pytest.raises(PruningError, match="An image came with a cache"):
                model(**{**inputs, "attention_mask": mask}, **{CACHE: cache})
