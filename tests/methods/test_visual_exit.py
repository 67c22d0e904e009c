"""Visual exit equals hiding all visual tokens from a layer on."""

import pytest
import torch

from catp_lightning import PruningPolicy, TokenPruning, prune
from catp_lightning.methods.scorers.visual_exit import VisualExit
from tests.support.matrix import BEAMS, exact, generate, scale
from tests.support.models import random_blip2
from tests.support.modules import Answering, Generating
from tests.support.oracles import IMAGE
from tests.support.rows import Row
from tests.support.stages import LLAMA, OPT, QWEN, chosen, masked, model_of
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_grad")
every_model = pytest.mark.parametrize("row", [LLAMA, QWEN, OPT], ids=repr)


EXIT = PruningPolicy(scorer="visual-exit", keep=0.3)


def test_half_of_any_depth_is_where_tokens_exit() -> None:
    assert [VisualExit().stages(depth) for depth in (2, 3, 4, 32)] == [(1,), (1,), (2,), (16,)]
    assert VisualExit(layer=5).stages(32) == (5,)


@pytest.mark.slow
@every_model
@pytest.mark.parametrize(("layer", "attention"), [(None, "sdpa"), (1, "sdpa"), (3, "sdpa"), (None, "eager")])
def test_visual_exit_equals_hiding_all_visual_tokens_from_a_layer_on(
    row: Row, layer: int | None, attention: str
) -> None:
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model, inputs = model_of(row, dtype, attention), row.inputs(dtype=dtype)
    policy = PruningPolicy(scorer="visual-exit", scorer_args={"layer": layer}, keep=7)
    nothing = [torch.zeros_like(chosen(inputs, row, (1,))[0])]
    full = model(**inputs).logits
    with prune(model, policy) as pruning:
        prefill = model(**inputs).logits
        tokens, steps = generate(row, model, inputs)
    with masked(row, model, inputs, (layer or 2,), nothing):
        oracle = model(**inputs).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs)
    rows, atol = row.oracle.compared(inputs, nothing[0]), row.tolerance(dtype, attention) * scale(full)
    assert scale(oracle[rows] - full[rows]) > 0.05 * scale(full), "exiting must move logits, or this proves nothing"
    exact(prefill[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)
    there = row.oracle.tokens(inputs)
    assert pruning.keep is not None and pruning.scores is not None
    assert pruning.keep.shape == there.shape and not pruning.keep.any()
    assert torch.equal(pruning.scores == 0, there), "and -inf where a sample has no token"
    assert pruning.prefills == 2 and pruning.last.counts.tolist() == there.sum(1).tolist()


@every_model
def test_after_exit_beams_and_uncached_steps_find_the_same(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    nothing = [torch.zeros_like(chosen(inputs, row, (1,))[0])]
    with prune(model, EXIT):
        beams, beam_steps = generate(row, model, inputs, **BEAMS)
        cached, steps = generate(row, model, inputs)
        uncached, again = generate(row, model, inputs, use_cache=False)
    with masked(row, model, inputs, (2,), nothing):
        oracle, oracle_steps = generate(row, model, inputs, **BEAMS)
    assert torch.equal(beams, oracle) and torch.equal(cached, uncached)
    exact(beam_steps, oracle_steps, atol=1e-10 * scale(beam_steps))
    exact(again, steps, atol=1e-10 * scale(steps))


@every_model
def test_the_loss_after_exit_leaves_out_labels_predicted_from_images(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    labels, nothing = row.oracle.labels(inputs), [torch.zeros_like(chosen(inputs, row, (1,))[0])]
    with prune(model, EXIT) as pruning:
        loss = model(**inputs, labels=labels).loss
    left_out = row.oracle.left_out(inputs, labels, nothing[0])
    assert pruning.labels_left_out == left_out.sum() > 0
    with masked(row, model, inputs, (2,), nothing):
        expected = model(**inputs, labels=labels.masked_fill(left_out, -100)).loss
    exact(loss, expected, atol=1e-10 * expected.item())


@every_model
def test_a_sample_does_not_depend_on_its_batch_after_exit(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    with prune(model, EXIT):
        _, together = generate(row, model, inputs, 2)
        for sample in range(len(together)):
            _, steps = generate(row, model, row.inputs([sample], pads=3), 2)
            exact(steps, together[[sample]], atol=1e-10 * scale(together))


def test_text_alone_and_everything_kept_run_unpruned() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    text = {"input_ids": torch.arange(10, 30).view(2, 10)}
    full, plain = model(**inputs).logits, model(**text).logits
    with prune(model, EXIT):
        assert torch.equal(model(**text).logits, plain)
    with prune(model, PruningPolicy(scorer="visual-exit", keep=1.0)):
        assert torch.equal(model(**inputs).logits, full)


@pytest.mark.parametrize("beams", [1, 2])
def test_of_a_sample_of_nothing_but_an_image_the_last_token_stays(beams: int) -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs([0, 0])
    ids = torch.tensor([[5, 8, 13, *[IMAGE] * 9, 6], [0, 0, 0, 0, *[IMAGE] * 9]])
    inputs = {**inputs, "input_ids": ids, "attention_mask": (ids != 0).long()}
    with prune(model, EXIT) as pruning:
        generate(LLAMA, model, inputs, num_beams=beams)
        assert pruning.keep.sum(1).tolist() == [0, 1] and pruning.keep[1, -1]
        model(**inputs)
        assert pruning.keep.sum(1).tolist() == [0, 1]


def test_the_callback_reports_that_nothing_is_kept() -> None:
    callback, (model, inputs) = TokenPruning(EXIT, compare=True), random_blip2()
    settings = {"max_new_tokens": 3, "do_sample": False}
    for run, module in (("validate", Answering((model, inputs))), ("predict", Generating(model, settings))):
        getattr(trainer(callback), run)(module, loading([inputs]))
        assert callback.figures["catp/tokens_kept"] == callback.figures["catp/keep_share"] == 0
        assert 0 <= callback.figures["catp/agreement"] <= 1
