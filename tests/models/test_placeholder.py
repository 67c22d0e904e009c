"""Models without a row in the matrix: pruned exactly where nothing speaks against it, and refused with the reason."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from catp_lightning import PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.models import find_family, placeholder
from tests.support.decoder_oracle import Decoder
from tests.support.families import OLDEST, ROWS
from tests.support.footprints import footprint
from tests.support.matrix import generate, uneven
from tests.support.newer_families import NEWER
from tests.support.newer_models import minimax
from tests.support.oracles import IMAGE
from tests.support.rows import Row
from tests.support.samples import pictures, prompts
from tests.support.small_configs import GATED, TOKENS, clip


class UnheardOfConfig(hf.LlavaConfig):
    model_type = "unheard_of"


class UnheardOf(hf.LlavaForConditionalGeneration):
    """A model of somebody else, whose type no family lists."""

    config_class = UnheardOfConfig


def unheard_of() -> hf.PreTrainedModel:
    return UnheardOf(UnheardOfConfig(vision_config=clip(), text_config=hf.LlamaConfig(**GATED), **TOKENS))


def test_a_model_nobody_knows_is_found_by_its_image_token_and_decoder_and_pruned_with_a_warning() -> None:
    row = Row("UnheardOf", unheard_of, lambda: prompts(pictures()), Decoder())
    model, inputs = row.model(), row.inputs()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="UnheardOf is not among the models"),
        prune(model, PruningPolicy(), choose=uneven()) as pruning,
    ):
        tokens, steps = generate(row, model, inputs)
    with torch.no_grad(), row.oracle.masked(model, inputs, pruning.keep):
        masked_tokens, masked_steps = generate(row, model, inputs)
    assert torch.equal(tokens, masked_tokens)
    torch.testing.assert_close(steps, masked_steps, rtol=0, atol=1e-10 * masked_steps.abs().max().item())


class UnreadConfig(hf.Lfm2VlConfig):
    model_type = "unread"


def unread(*layers: str) -> hf.PreTrainedModel:
    """A model that nobody here has read: it takes `spatial_shapes`, the sizes of its images."""
    text = hf.Lfm2Config(**{**GATED, "num_hidden_layers": len(layers)}, layer_types=list(layers))
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = UnreadConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return hf.Lfm2VlForConditionalGeneration(config)


def test_a_decoder_with_layers_of_another_kind_is_refused() -> None:
    model = unread("conv", "full_attention", "conv")
    with pytest.raises(PruningError, match="Lfm2Model has layers of type conv; full and sliding attention can"):
        find_family(model)


def test_the_published_minimax_m3_whose_layers_choose_blocks_of_keys_is_refused() -> None:
    with pytest.raises(PruningError, match="MiniMaxM3VLTextModel has layers of type minimax_m3_sparse"):
        find_family(minimax(sparse=True))


UNKNOWN = r"Lfm2VlForConditionalGeneration also takes spatial_shapes: how it makes tokens of images is not known"


@pytest.mark.filterwarnings("ignore:.*is not among the models")
@pytest.mark.parametrize("scorer", ["l2-norm", "random", "stride", "position", "cdpruner", "divprune"])
def test_images_of_unknown_sizes_are_refused_at_entry_by_what_scores_them(scorer: str) -> None:
    model = unread("full_attention", "full_attention")
    before = footprint(model)
    with pytest.raises(PruningError, match=UNKNOWN), prune(model, PruningPolicy(scorer, keep=0.5)):
        pytest.fail("entered")
    assert footprint(model) == before


@pytest.mark.parametrize(
    ("policy", "choose"),
    [
        (PruningPolicy(keep=1.0), None),
        (PruningPolicy("l2-norm", keep=0.5), uneven()),
        (PruningPolicy("visual-exit", {"layer": 1}, keep=0.5), None),
    ],
    ids=["keep 1.0", "chosen by the caller", "inside the decoder"],
)
def test_where_sizes_of_images_do_not_matter_a_model_nobody_knows_is_entered_and_told_what_it_lacks(
    policy: PruningPolicy, choose: Callable[[Tensor], Tensor] | None
) -> None:
    model = unread("full_attention", "full_attention")
    with (
        pytest.warns(UserWarning, match="should be; compare.*Its images take spatial_shapes, so most scorers"),
        prune(model, policy, choose=choose),
    ):
        pass


class Asked(LightningModule):
    """A project whose model nobody knows; it notes the batches that reached it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.batches = unread("full_attention", "full_attention"), 0

    def predict_step(self, batch: Tensor) -> Tensor:
        self.batches += 1
        return batch


@pytest.mark.filterwarnings("ignore:.*is not among the models")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_refuses_them_before_its_first_batch() -> None:
    module = Asked()
    trainer = Trainer(
        callbacks=[TokenPruning(PruningPolicy("l2-norm", keep=0.5))],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(PruningError, match=UNKNOWN):
        trainer.predict(module, DataLoader(torch.zeros(4, 1)))  # type: ignore[arg-type]
    assert module.batches == 0


def named(name: str) -> Row:
    return next(row for row in [*ROWS, *NEWER] if row.name == name)


def test_compact_positions_of_visual_tokens_with_coordinates_are_refused_at_entry() -> None:
    compact = PruningPolicy("l2-norm", keep=0.5, positions="compact")
    for name in ("Qwen2-VL", "GLM-OCR", "PaddleOCR-VL"):
        with (
            pytest.raises(PruningError, match='positions="compact" has no meaning'),
            prune(named(name).model(), compact),
        ):
            pytest.fail("entered")
    with prune(named("EXAONE-4.5").model(), compact):
        pass  # its tokens stand in a row


def test_layers_before_the_last_that_features_are_added_to_are_refused_at_entry() -> None:
    for name in ("Qwen3-VL", "Qwen3-VL-MoE", "Cosmos3-Omni"):
        policy = PruningPolicy("visual-exit", {"layer": 1}, keep=0.5)
        early = pytest.raises(PruningError, match=r"first 3 layers.*choose layers from 3 on")
        with early, prune(named(name).model(), policy):
            pytest.fail("entered")


@pytest.mark.slow
@pytest.mark.skipif(OLDEST, reason="transformers 5.13 has the thinker in another form")
def test_in_a_whole_qwen_omni_the_thinker_is_found() -> None:
    whole = hf.Qwen2_5OmniForConditionalGeneration
    with torch.device("meta"):
        assert find_family(whole(whole.config_class())).name == "qwen2-5-omni-thinker"


def test_the_loss_of_a_router_is_refused_at_entry() -> None:
    model = named("Qwen3-VL-MoE").make()
    model.config.text_config.output_router_logits = True
    with pytest.raises(PruningError, match=r"output_router_logits=True.*Set it to False in the text config"):
        find_family(model)


def test_a_decoder_with_inputs_that_nobody_shortens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deepstack = {"visual_pos_masks", "deepstack_visual_embeds"}
    monkeypatch.setattr(placeholder, "KNOWN_INPUTS", placeholder.KNOWN_INPUTS - deepstack)
    model = next(row for row in ROWS if row.name == "Qwen3-VL").model()
    with pytest.raises(PruningError, match="Qwen3VLTextModel also takes deepstack_visual_embeds, visual_pos_masks"):
        find_family(model)
