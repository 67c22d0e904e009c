"""SGL: a small model's attention ranks the visual tokens of a large one, once for each prompt."""

import pytest
import torch
from torch import nn

from catp_lightning import PrunedModule, PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.pruning.guide import rows_paid
from tests.support.families import BY_NAME
from tests.support.guides import RULE, guide, slowly, small_llava, with_images
from tests.support.modules import Answering
from tests.support.oracles import IMAGE, VIDEO
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_grad")
GREEDY = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ended"),
    [
        ("Llava", False),
        *((name, True) for name in ("Llava", "LlavaNext", "Qwen2.5-VL", "Blip2-OPT", "Gemma3", "PaliGemma2")),
    ],
)
def test_scores_are_the_sum_over_layers_heads_and_rows_of_text_until_the_answer_ends(name: str, ended: bool) -> None:
    row, model = BY_NAME[name], guide(name)
    inputs, samples, ends = row.inputs(with_images(row), pads=2), with_images(row), tuple[int, ...]()
    if ended:
        answer = slowly(row, model, samples[0], ())[1]
        ends = (answer[1],)  # the first sample's answer ends here, others go on
    head = getattr(model, "language_model", model) if name == "Blip2-OPT" else model
    head.generation_config.eos_token_id = list(ends) or None
    try:
        with prune(row.model(), RULE, guide=model) as pruning:
            row.model()(**row.oracle.forward_inputs(inputs))
    finally:
        head.generation_config.eos_token_id = None
    lengths = set()
    for place, own in enumerate(samples):
        expected, answer = slowly(row, model, own, ends)
        lengths.add(len(answer))
        mine = pruning.scores[place]
        torch.testing.assert_close(mine[: len(expected)], torch.tensor(expected).double(), rtol=0, atol=2e-5)
        assert (mine[len(expected) :] == -torch.inf).all()
    assert not ended or len(lengths) > 1, "an answer that ends early stands beside one that does not"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llava", "Qwen2.5-VL", "Blip2-OPT"])
def test_a_choice_belongs_to_the_sample_and_to_the_prompt(name: str) -> None:
    row, runs = BY_NAME[name], []
    model, inputs = row.model(), row.inputs(range(len(row.samples())))
    hook = guide(name).get_input_embeddings().register_forward_hook(lambda *call: runs.append(call[1][0].shape))
    try:
        with prune(model, RULE, guide=guide(name)) as pruning:
            model(**row.oracle.forward_inputs(inputs))
            keep, scores = pruning.keep, pruning.scores
            once = len(runs)
            model.generate(**inputs, **GREEDY, use_cache=False)
            assert torch.equal(pruning.keep, keep), "generate keeps what forward does, at every step"
            assert len(runs) == 2 * once, "the guide runs once for a prompt"
            few = [own for own, sample in enumerate(row.samples()) if len(sample.images) < 2]
            model.generate(**row.inputs(few), **GREEDY, num_beams=2)
            assert torch.equal(pruning.keep, keep[few, : pruning.keep.shape[1]]), "before beams are expanded"
            for own in with_images(row):
                model(**row.oracle.forward_inputs(row.inputs([own], pads=3)))
                width = pruning.keep.shape[1]
                assert torch.equal(pruning.keep[0], keep[own, :width]) and not keep[own, width:].any()
                torch.testing.assert_close(pruning.scores[0], scores[own, :width], rtol=0, atol=1e-5)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["Llava", "Blip2-OPT"])
def test_an_answer_with_labels_changes_nothing(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs()
    with prune(model, RULE, guide=guide(name)) as pruning:
        model(**row.oracle.forward_inputs(inputs))
        keep, scores = pruning.keep, pruning.scores
        for words in ([5, 6, 7], [80, 81, 82]):
            answer = torch.tensor([words] * len(keep))
            answered = row.oracle.grow(inputs, answer)
            labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
            model(**row.oracle.forward_inputs(answered), labels=labels)
            assert torch.equal(pruning.keep, keep)
            torch.testing.assert_close(pruning.scores, scores, rtol=0, atol=1e-9)
            labels[:, 0] = 3  # all of the prompt is answer: only images are read, and what the guide says of them
            model(**row.oracle.forward_inputs(answered), labels=labels)
            assert pruning.scores[row.oracle.tokens(inputs)].isfinite().all()


def test_padding_on_the_right_changes_nothing() -> None:
    row = BY_NAME["Llava"]
    left = row.inputs([0, 1])
    right = {**left, "input_ids": left["input_ids"].clone(), "attention_mask": left["attention_mask"].clone()}
    for at, mask in enumerate(left["attention_mask"]):
        for name in ("input_ids", "attention_mask"):
            right[name][at] = left[name][at].roll(int(mask.sum()))
    assert not torch.equal(right["attention_mask"], left["attention_mask"])
    found = []
    with prune(row.model(), RULE, guide=guide("Llava")) as pruning:
        for inputs in (left, right):
            row.model()(**inputs)
            found.append(pruning.scores)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_layers_and_heads_of_the_guide_can_be_weighed() -> None:
    row, found = BY_NAME["Llava"], []
    for args in ({"layers": [1]}, {"layers": [-1], "head_weights": [[1.0, 0.0]]}, {"head_weights": [[1, 2], [-1, 0]]}):
        policy = PruningPolicy(scorer="sgl", scorer_args={**args, "answer_tokens": 1}, keep=3)
        with prune(row.model(), policy, guide=guide("Llava")) as pruning:
            row.model()(**row.inputs([0]))
        found.append(pruning.scores[0])
    model = guide("Llava")
    model.set_attn_implementation("eager")
    maps = model(**row.inputs([0]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    visual = row.inputs([0])["input_ids"][0] == IMAGE
    after = (visual.cumsum(0) > 0) & ~visual
    paid = torch.stack([layer[0][:, after][..., visual].sum(1) for layer in maps])  # [L, H, T]
    expected = [paid[1].sum(0), paid[1, 0], paid[0, 0] + 2 * paid[0, 1] - paid[1, 0]]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected).double(), rtol=0, atol=1e-5)


def test_rows_that_do_not_count_pay_nothing_and_those_of_padding_are_no_nan() -> None:
    """Keys (0, ln 2), rows of 1: by causality row 0 pays (1, 0), row 1 pays (1/3, 2/3)."""
    query, key = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 2.0]).log1p().view(1, 1, 2, 1) * 0
    key[0, 0, 1] = torch.tensor(2.0).log()
    for rows, expected in (([True, True], [4 / 3, 2 / 3]), ([False, True], [1 / 3, 2 / 3]), ([False, False], [0, 0])):
        paid = rows_paid(query, key, None, 1.0, torch.tensor([rows]))
        torch.testing.assert_close(paid[0, 0], torch.tensor(expected).float())
    batch = torch.tensor([[True, True], [False, True]])  # the second sample's first column is padding: it sees nothing
    mask = torch.tensor([[[[1, 0], [1, 1]]], [[[0, 0], [0, 1]]]]).bool()
    paid = rows_paid(query.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1), mask, 1.0, batch)
    torch.testing.assert_close(paid[:, 0], torch.tensor([[4 / 3, 2 / 3], [0, 1]]))
    flash = torch.tensor([[1, 1], [0, 1]])
    same = rows_paid(query.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1), flash, 1.0, batch)
    torch.testing.assert_close(same, paid)


def test_modes_do_not_matter_and_a_module_may_hold_the_guide() -> None:
    row, small = BY_NAME["Llava"], small_llava(attention_dropout=0.9).double()
    found = []
    for held in (small.eval(), nn.ModuleDict({"inside": small.train()})):
        with prune(row.model(), RULE, guide=held) as pruning:
            row.model()(**row.inputs())
        found.append(pruning.scores)
    assert torch.equal(found[0], found[1])


def test_the_callback_and_the_wrapper_hand_the_guide_on() -> None:
    row, small = BY_NAME["Llava"], guide("Llava")
    module, loader = Answering((row.model(), row.inputs())), loading([row.inputs()])
    with prune(module, RULE, guide=small):
        expected = module.model(**row.inputs()).logits
    by_callback = trainer(TokenPruning(RULE, guide=small)).predict(module, loader)
    wrapper = PrunedModule(module, RULE, guide=small)
    by_wrapper = trainer().predict(wrapper, loader)
    assert torch.equal(by_callback[0], expected) and torch.equal(by_wrapper[0], expected)
    assert not set(small.parameters()) & set(wrapper.parameters()), "it is neither trained nor saved"
    with pytest.raises(PruningError, match="guide=small_model"):
        trainer(TokenPruning(RULE)).predict(module, loader)
