"""SGL: guides that cannot guide are refused, and a guide is afterwards what it was."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from tests.support.families import BY_NAME
from tests.support.footprints import footprint, modes
from tests.support.guides import RULE, guide, small_llava
from tests.support.hybrid_families import HYBRID
from tests.support.small_configs import GATED, TOKENS, clip

HYBRIDS = {row.name: row for row in HYBRID}
pytestmark = pytest.mark.usefixtures("no_grad")


def test_without_a_guide_the_error_says_how_to_give_one_and_nothing_scored_needs_none() -> None:
    row = BY_NAME["Llava"]
    with pytest.raises(PruningError, match=r"guide=small_model"), prune(row.model(), RULE):
        pass
    with prune(row.model(), RULE.with_keep(1.0)) as pruning:
        row.model()(**row.inputs([0]))
    assert pruning.keep.all()
    with pytest.raises(PolicyError, match="answer_tokens is 0"):
        PruningPolicy(scorer="sgl", scorer_args={"answer_tokens": 0})


@pytest.mark.parametrize("name", ["Mllama", "Blip2-T5"])
def test_models_whose_decoder_reads_no_visual_rows_are_refused(name: str) -> None:
    for given in (None, guide("Llava")):
        with pytest.raises(PruningError, match=r"reads them by (cross-attention|encoder)"):
            prune(BY_NAME[name].model(), RULE, guide=given).__enter__()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: small_llava(vocab_size=130), r"vocabulary of 130 tokens.* 120\b"),
        (BY_NAME["Llava"].model, "shares modules"),
        (BY_NAME["Mllama"].model, "MllamaForConditionalGeneration reads them by cross-attention"),
        (lambda: nn.Linear(1, 1), "holds no model"),
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GATED)), "holds no model"),
        (lambda: guide("Qwen2.5-VL"), r"image tokens of id \(110, 111\).* \(110,\)"),
    ],
)
def test_a_guide_of_another_kind_is_refused(other: Any, says: str) -> None:
    with pytest.raises(PruningError, match=says):
        prune(BY_NAME["Llava"].model(), RULE, guide=other()).__enter__()


def test_a_layer_the_guide_lacks_is_refused() -> None:
    policy = PruningPolicy(scorer="sgl", scorer_args={"layers": [2]})
    with pytest.raises(PruningError, match=r"layer 2 of the guide.* has 2, numbered 0 to 1"):
        prune(BY_NAME["Llava"].model(), policy, guide=guide("Llava")).__enter__()


def test_layers_without_attention_are_refused_with_their_numbers() -> None:
    row = HYBRIDS["Qwen3.5"]
    with pytest.raises(PruningError, match=r"layers \[0.*\] of Qwen3_5ForConditionalGeneration have none: they are re"):
        prune(row.model(), RULE, guide=deepcopy(row.model())).__enter__()


def test_another_number_of_visual_tokens_is_refused_with_both_and_the_guide_is_left_as_it_was() -> None:
    config = BY_NAME["LlavaNext"].make().config
    config.vision_config.patch_size = 16  # a crop is one patch, where the model has four
    row, coarse = BY_NAME["LlavaNext"], hf.LlavaNextForConditionalGeneration(config).train()
    coarse.model.language_model.layers[0].eval()
    with pytest.raises(ValueError, match="do not match"):
        coarse(**row.inputs([0], dtype=torch.float32))  # transformers sets hooks in the first call, and they stay
    before, inputs = (footprint(coarse), modes(coarse)), row.inputs([0])
    with prune(row.model(), RULE, guide=coarse):
        with pytest.raises(PruningError, match=r"cannot read this prompt.* tokens: 14, features: 4"):
            row.model()(**inputs)
        assert (footprint(coarse), modes(coarse)) == before


def test_other_grids_are_refused_when_entering_where_they_are_known() -> None:
    row = BY_NAME["Blip2-OPT"]
    config = row.make().config
    config.num_query_tokens = 7
    with pytest.raises(PruningError, match=r"has 7 visual tokens an image, the model Blip2\w+ \d+"):
        prune(row.model(), RULE, guide=hf.Blip2ForConditionalGeneration(config)).__enter__()
    coarse = hf.LlavaConfig(vision_config=clip(patch_size=12), text_config=hf.LlamaConfig(**GATED), **TOKENS)
    with pytest.raises(PruningError, match=r"has 4 visual tokens an image, the model Llava\w+ 9"):
        prune(BY_NAME["Llava"].model(), RULE, guide=hf.LlavaForConditionalGeneration(coarse)).__enter__()


def test_a_guide_that_is_being_pruned_is_refused() -> None:
    small = guide("Llava")
    with (
        prune(small, PruningPolicy(scorer="stride")),
        pytest.raises(PruningError, match="being pruned already"),
        prune(BY_NAME["Llava"].model(), RULE, guide=small),
    ):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_the_guide_is_what_it_was_after_every_prompt(fails: bool) -> None:
    row, small = BY_NAME["Llava"], guide("Llava")
    small(**row.inputs([0]))
    small.train()
    small.model.vision_tower.eval()
    before = footprint(small)

    def fail(*call: Any) -> None:
        raise KeyboardInterrupt

    hook = small.model.language_model.layers[1].mlp.register_forward_hook(fail) if fails else None
    counted = footprint(small), modes(small)
    try:
        with prune(row.model(), RULE, guide=small):
            if fails:
                with pytest.raises(KeyboardInterrupt):
                    row.model()(**row.inputs([0]))
            else:
                row.model()(**row.inputs([0]))
            assert (footprint(small), modes(small)) == counted
    finally:
        if hook is not None:
            hook.remove()
        small.eval()
    assert footprint(small) == before
