"""Models without a row in the matrix: pruned exactly where nothing speaks against it, and refused with the reason."""

import pytest
import torch
import transformers as hf

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.families import find_family, placeholder
from tests.families import GATED, IMAGE, ROWS, TOWER, Row, pictures, prompts
from tests.oracles import Decoder
from tests.test_families import generate, uneven


def aya_vision() -> hf.PreTrainedModel:
    return hf.AyaVisionForConditionalGeneration(
        hf.AyaVisionConfig(
            vision_config=hf.SiglipVisionConfig(**{**TOWER, "image_size": 48}, vision_use_head=False),
            text_config=hf.LlamaConfig(**GATED),
            image_token_index=IMAGE,
            downsample_factor=2,
        )
    )


def test_a_model_nobody_knows_is_found_by_its_image_token_and_decoder_and_pruned_with_a_warning() -> None:
    row = Row("AyaVision", aya_vision, lambda: prompts(pictures(9, (3, 48, 48))), Decoder())
    model, inputs = row.model(), row.inputs()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="AyaVisionForConditionalGeneration is not among the models"),
        prune(model, PruningPolicy(), choose=uneven()) as pruning,
    ):
        tokens, steps = generate(row, model, inputs)
    with torch.no_grad(), row.oracle.masked(model, inputs, pruning.keep):
        masked_tokens, masked_steps = generate(row, model, inputs)
    assert torch.equal(tokens, masked_tokens)
    torch.testing.assert_close(steps, masked_steps, rtol=0, atol=1e-10 * masked_steps.abs().max().item())


def test_a_decoder_with_layers_of_another_kind_is_refused() -> None:
    text = hf.Lfm2Config(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.Lfm2VlForConditionalGeneration(
        hf.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )
    with pytest.raises(PruningError, match="Lfm2Model has layers of type conv; full and sliding attention can"):
        find_family(model)


def test_a_decoder_with_inputs_that_nobody_shortens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deepstack = {"visual_pos_masks", "deepstack_visual_embeds"}
    monkeypatch.setattr(placeholder, "KNOWN_INPUTS", placeholder.KNOWN_INPUTS - deepstack)
    model = next(row for row in ROWS if row.name == "Qwen3-VL").model()
    with pytest.raises(PruningError, match="Qwen3VLTextModel also takes deepstack_visual_embeds, visual_pos_masks"):
        find_family(model)
