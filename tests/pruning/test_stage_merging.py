"""Inside the decoder: a carried mean equals the full run with that mean written in; what scorers see is what ran."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning.methods.observation import Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.models import find_family
from catp_lightning.pruning.sites import SiteSettings
from catp_lightning.pruning.sites.decoder_layers import PruneAtDecoderLayers
from catp_lightning.pruning.sites.stage_prompt import StagePrompt
from tests.support.matrix import BEAMS, exact, generate, scale
from tests.support.oracles import IMAGE, VIDEO, Inputs, hooked, visual_columns
from tests.support.rows import Row
from tests.support.stage_merging import Merging, carriers_of, check_merging, merging, written
from tests.support.stages import LLAMA, OPT, QWEN, Uneven, chosen, masked, model_of, schedules, stack_of

pytestmark = pytest.mark.usefixtures("no_grad")
every_model = pytest.mark.parametrize("row", [LLAMA, QWEN], ids=repr)


@pytest.mark.slow
@every_model
@pytest.mark.parametrize(
    ("stages", "attention"),
    [((1,), "sdpa"), ((2,), "sdpa"), ((1, 3), "sdpa"), ((1, 3), "eager"), ((0, 1, 3), "sdpa"), ((0, 1, 3), "eager")],
    ids=str,
)
def test_a_carried_mean_equals_the_mean_written_into_the_full_run(
    row: Row, stages: tuple[int, ...], attention: str
) -> None:
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model, inputs = model_of(row, dtype, attention), row.inputs(pads=3, dtype=dtype)
    check_merging(row, model, inputs, stages, row.tolerance(dtype, attention))


@schedules([LLAMA, QWEN], [LLAMA, QWEN])
def test_beams_find_what_the_full_run_with_means_finds(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs()
    keeps = chosen(inputs, row, stages)
    with merging(model, stages, Merging()).installed():
        tokens, steps = generate(row, model, inputs, **BEAMS)
    with (
        masked(row, model, inputs, stages, keeps),
        written(row, model, inputs, stages, carriers_of(inputs, row, keeps)),
    ):
        oracle_tokens, oracle_steps = generate(row, model, inputs, **BEAMS)
    assert torch.equal(tokens, oracle_tokens)
    exact(steps, oracle_steps, atol=1e-10 * scale(steps))


@schedules([LLAMA, QWEN], [LLAMA, QWEN])
def test_means_do_not_depend_on_the_batch_or_padding(row: Row, stages: tuple[int, ...]) -> None:
    model, inputs = model_of(row), row.inputs()
    with merging(model, stages, Merging()).installed():
        _, together = generate(row, model, inputs, 2)
    for rows, pads in [([sample], 0) for sample in range(len(together))] + [(list(range(len(together)))[::-1], 4)]:
        with merging(model, stages, Merging(Uneven(rows))).installed():
            _, steps = generate(row, model, row.inputs(rows, pads), 2)
        exact(steps, together[rows], atol=1e-10 * scale(together))


def test_means_in_bfloat16_are_rounded_once() -> None:
    """Sums of nine tokens in bfloat16 would lose bits on the way."""
    model, inputs = model_of(LLAMA, torch.bfloat16), LLAMA.inputs([0], dtype=torch.bfloat16)
    seen: list[Tensor] = []
    layer = stack_of(LLAMA, model).layers[1]

    def all_in_one(prompt: StagePrompt) -> Selection:
        return Selection(torch.arange(9)[None] == 0, torch.zeros(1, 9, dtype=torch.int64))

    dropper = PruneAtDecoderLayers(find_family(model), all_in_one, SiteSettings((1,)))
    before = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(first(args, kwargs)), with_kwargs=True
    )
    with dropper.installed():
        after = layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(first(args, kwargs)), with_kwargs=True
        )
        model(**inputs)
    before.remove(), after.remove()
    full, short = seen
    at = visual_columns(inputs)[0].nonzero()[:, 0]
    assert torch.equal(short[0, at[0]], full[0, at].double().mean(0).to(torch.bfloat16))


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


NEEDS = {
    Signal.TEXT_TO_IMAGE_ATTENTION: (0, -1),
    Signal.LAST_TOKEN_ATTENTION: (-1,),
    Signal.HIDDEN_STATES: None,
    Signal.IMAGE_EMBEDS: None,
    Signal.TEXT_EMBEDS: None,
}


@dataclass
class Seeing:
    """Uneven's choice, and what scorers would have seen at each stage."""

    uneven: Uneven = field(default_factory=Uneven)
    seen: list[Any] = field(default_factory=list)

    def __call__(self, prompt: StagePrompt) -> Tensor:
        self.seen.append(prompt.observation())
        return self.uneven(prompt)


def seeing(model: Any, stages: tuple[int, ...], choose: Seeing) -> PruneAtDecoderLayers:
    decide = lambda prompt: Selection(choose(prompt))  # noqa: E731
    return PruneAtDecoderLayers(find_family(model), decide, SiteSettings(stages, NEEDS))


def text_by_hand(inputs: Inputs, labels: Tensor | None) -> list[list[int]]:
    """Columns of the text rows of each sample: after its first image, before its first label; all if none is after."""
    found = []
    for place, ids in enumerate(inputs["input_ids"].tolist()):
        own = []
        for column, token in enumerate(ids):
            if labels is not None and labels[place, column] != -100:
                break
            if inputs["attention_mask"][place, column] and token not in (IMAGE, VIDEO):
                own.append(column)
        after = [column for column in own if {IMAGE, VIDEO} & {*ids[:column]}]
        found.append(after or own)
    return found


def check_seen(row: Row, inputs: Inputs, choose: Seeing, keeps: list[Tensor], labels: Tensor | None) -> None:
    """Against an eager run of the full model, in which what left is hidden from the layers after it."""
    stages, eager = (1, 3), model_of(row, torch.float32, "eager")
    read: dict[str, Any] = {}
    with (
        masked(row, eager, inputs, stages, keeps),
        hooked([stack_of(row, eager)], lambda m, a, k: read.update(k) or {}),
    ):
        run = eager(**inputs, output_attentions=True, output_hidden_states=True)
    run, embeds = run.get("language_model_outputs", run), read["inputs_embeds"]
    texts, visual = text_by_hand(inputs, labels), visual_columns(inputs)
    there = [row.oracle.tokens(inputs), keeps[0]]
    for seen, stage, valid in zip(choose.seen, stages, there, strict=True):
        assert torch.equal(seen.valid, valid)
        assert seen.text.sum(1).tolist() == [len(own) for own in texts]
        for place, (own, columns) in enumerate(zip(texts, visual, strict=True)):
            tokens, stay = int(columns.sum()), valid[place]
            for layer in {0, stage - 1}:
                maps = run.attentions[layer][place]
                rows = seen.values[Signal.TEXT_TO_IMAGE_ATTENTION, layer][place]
                paid = maps[:, own][:, :, columns] * (stay[:tokens] if layer else 1)
                exact(rows[:, : len(own), :tokens], paid, atol=1e-5)
                assert not rows[:, len(own) :].any() and not rows[..., tokens:].any()
            hidden = seen[Signal.HIDDEN_STATES][place]
            exact(hidden[stay], run.hidden_states[stage][place][columns][stay[:tokens]], atol=2e-5 * scale(hidden))
            exact(seen[Signal.IMAGE_EMBEDS][place, :tokens], embeds[place][columns], atol=1e-5 * scale(embeds))
            exact(seen[Signal.TEXT_EMBEDS][place, : len(own)], embeds[place][own], atol=1e-5 * scale(embeds))
            assert (
                not seen[Signal.IMAGE_EMBEDS][place, tokens:].any()
                and not seen[Signal.TEXT_EMBEDS][place, len(own) :].any()
            )


@pytest.mark.parametrize("row", [LLAMA, QWEN, OPT], ids=repr)
@pytest.mark.parametrize("answered", [False, True], ids=["prompt", "labels"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_scorers_see_is_what_an_eager_run_shows(row: Row, answered: bool, attention: str) -> None:
    model, inputs = model_of(row, torch.float32, attention), row.inputs(pads=2, dtype=torch.float32)
    labels = None
    if answered:
        real, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
        labels = torch.where(real & (torch.arange(length) >= length - 3), inputs["input_ids"], -100)
    with seeing(model, (1, 3), choose := Seeing()).installed():
        model(**inputs, **({} if labels is None else {"labels": labels}))
    check_seen(row, inputs, choose, chosen(inputs, row, (1, 3)), labels)


@every_model
def test_beams_and_uncached_steps_show_what_the_forward_shows(row: Row) -> None:
    model, inputs = model_of(row), row.inputs([0, 2])  # older versions of generate mix several images up for beams
    with seeing(model, (1, 3), choose := Seeing()).installed():
        model(**inputs)
        generate(row, model, inputs, num_beams=3)
        generate(row, model, inputs, use_cache=False)
    assert len(choose.seen) > 6
    for number, seen in enumerate(choose.seen):
        forward = choose.seen[number % 2]
        assert seen.values.keys() == forward.values.keys() and torch.equal(seen.text, forward.text)
        for name, value in forward.values.items():
            exact(seen.values[name], value, atol=1e-9 * max(1.0, scale(value)))


def test_a_sample_whose_image_comes_last_is_read_by_all_of_its_text() -> None:
    model = model_of(LLAMA, torch.float32)
    ids = torch.tensor([[5, 8, 13, *[IMAGE] * 9], [*[IMAGE] * 9, 5, 8, 13]])
    inputs = {**LLAMA.inputs([0, 0], dtype=torch.float32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with seeing(model, (1, 3), choose := Seeing()).installed():
        model(**inputs)
    rows = choose.seen[0].by_layer(Signal.TEXT_TO_IMAGE_ATTENTION, (0,))[:, 0]
    assert rows.shape[2] == 3 and not rows[0].any() and rows[1].any(), "text before an image pays it nothing"
    check_seen(LLAMA, inputs, choose, chosen(inputs, LLAMA, (1, 3)), None)
