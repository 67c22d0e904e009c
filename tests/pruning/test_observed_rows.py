"""The rows of attention that are observed inside the decoder, and what scorers see there."""

import pytest
import torch
from torch import Tensor

from catp_lightning.methods.observation import Signal
from catp_lightning.pruning.sites.stage_prompt import StagePrompt
from tests.support.matrix import exact
from tests.support.oracles import IMAGE, Inputs, columns_kept
from tests.support.rows import Row
from tests.support.stages import LLAMA, MostAttended, every_model, masked, model_of, stages_of

pytestmark = pytest.mark.usefixtures("no_grad")


def paid_by(maps: Tensor, at: Tensor, inputs: Inputs, row: Row) -> Tensor:
    """Of maps [B, H, L, L], what the row `at`, int64 [B], pays the visual tokens: [B, H, T]."""
    visual = ~columns_kept(inputs, torch.zeros_like(row.oracle.tokens(inputs)))
    found = torch.zeros(*maps.shape[:2], int(visual.sum(1).max()), dtype=maps.dtype)
    for sample, columns in enumerate(visual):
        found[sample, :, : columns.sum()] = maps[sample, :, at[sample], columns]
    return found


# Padded rows of eager attention are NaN in float64: its softmax is in float32, where its mask overflows.
WHOLE, ALONE = (torch.float32, "eager", None), (torch.float64, None, [1])


@every_model
@pytest.mark.parametrize(("dtype", "attention", "samples"), [WHOLE, ALONE], ids=["eager", "its own"])
def test_the_observed_row_is_that_of_an_eager_run(
    row: Row, dtype: torch.dtype, attention: str | None, samples: list[int] | None
) -> None:
    model, inputs, stages = model_of(row, dtype, attention), row.inputs(samples, dtype=dtype), (1, 3)
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    with stages_of(model, stages, choose := MostAttended(), observe=True).installed():
        observed = model(**inputs).logits
    keeps = choose.keeps
    with stages_of(model, stages, lambda prompt: keeps[prompt.stage]).installed():
        assert torch.equal(model(**inputs).logits, observed), "observing changes nothing"
    eager = model_of(row, dtype, "eager")
    with masked(row, eager, inputs, stages, keeps):
        maps = eager(**inputs, output_attentions=True)
        maps = maps.get("language_model_outputs", maps).attentions
    first, second = choose.seen
    assert first.attention.max() > 0.05
    for prompt, layer in ((first, 0), (second, 2)):
        paid = paid_by(maps[layer], last, inputs, row) * prompt.tokens[:, None]
        exact(prompt.attention, paid, atol=1e-6)
    assert torch.equal(second.tokens, keeps[0])


@every_model
def test_with_labels_the_row_before_the_first_label_is_observed(row: Row) -> None:
    model, inputs = model_of(row, torch.float32, "eager"), row.inputs(dtype=torch.float32)
    real, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    labels = torch.where(real & (torch.arange(length) >= length - 3), inputs["input_ids"], -100)
    labels[0] = torch.where(real[0], inputs["input_ids"][0], -100)  # no row is before its first label
    before = torch.full((len(real),), length - 4)
    before[0] = real[0].long().argmax()
    if row.oracle.first_type:  # an answer has another type than a prompt, which does not see it
        inputs["token_type_ids"] = (labels != -100).long()
    maps = model(**inputs, labels=labels, output_attentions=True)
    maps = maps.get("language_model_outputs", maps).attentions[0]
    with stages_of(model, (1,), choose := MostAttended(), observe=True).installed():
        model(**inputs, labels=labels)
        answered = {**inputs, "input_ids": torch.where(torch.arange(length) < length - 3, inputs["input_ids"], 50)}
        model(**answered, labels=torch.where(labels == -100, -100, answered["input_ids"]))
    exact(choose.seen[0].attention, paid_by(maps, before, inputs, row), atol=1e-6)
    exact(choose.seen[1].attention, choose.seen[0].attention, atol=1e-6)
    assert torch.equal(*choose.keeps), "a changed answer changes no choice"


def test_where_the_prompt_ends_in_an_image_the_last_row_still_there_is_observed() -> None:
    row, model, eager = LLAMA, model_of(LLAMA), model_of(LLAMA, attention="eager")
    inputs = {**LLAMA.inputs([0, 0]), "input_ids": torch.tensor([[5, 8, 13] + [IMAGE] * 9] * 2)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    seen: list[StagePrompt] = []
    keeps = [torch.arange(9) < torch.tensor([[6], [9]]), torch.arange(9) < torch.tensor([[2], [9]])]

    def choose(prompt: StagePrompt) -> Tensor:
        seen.append(prompt)
        return keeps[prompt.stage]

    with stages_of(model, (1, 3), choose, observe=True).installed():
        model(**inputs)
    with masked(row, eager, inputs, (1, 3), keeps):
        maps = eager(**inputs, output_attentions=True).attentions
    for prompt, layer, last in ((seen[0], 0, [11, 11]), (seen[1], 2, [8, 11])):
        paid = paid_by(maps[layer], torch.tensor(last), inputs, row) * prompt.tokens[:, None]
        exact(prompt.attention, paid, atol=1e-6)


def test_scorers_see_the_tokens_that_are_still_there_as_one_image_a_sample() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    with stages_of(model, (1, 3), choose := MostAttended(), observe=True).installed():
        model(**inputs)
    seen = choose.seen[1].observation()
    assert torch.equal(seen.valid, choose.keeps[0])
    assert torch.equal(seen.by_layer(Signal.LAST_TOKEN_ATTENTION, (-1,))[:, 0], choose.seen[1].attention)
