"""Llama-3.2-Vision: rows that no text sees are never stored, and dropping rows equals masking them, everywhere."""

import pytest
import torch
from torch import Tensor

from catp_lightning.prompt.prompt import CrossAttended
from tests.support.cross_attended import (
    CASES,
    CROSS,
    GREEDY,
    IMAGE,
    LENGTH,
    NEW,
    ROWS,
    TILES,
    TOLERANCE,
    Case,
    cross_cache,
    dropping,
    everything,
    generate,
    inputs_of,
    masking,
    model_of,
    padded,
    seen,
    top_attended,
    uneven,
)
from tests.support.oracles import CACHE, cache_of
from tests.support.steps import difference

pytestmark = pytest.mark.usefixtures("no_grad")
PADDED = "one or two images, padded"
every_case = pytest.mark.parametrize(
    ("case", "dtype", "attention"),
    [*((case, torch.float64, "sdpa") for case in CASES), (PADDED, torch.float32, "eager")],
    ids=str,
)


@every_case
def test_rows_that_no_text_sees_are_never_stored_and_nothing_changes(
    case: str, dtype: torch.dtype, attention: str
) -> None:
    model, inputs = model_of(dtype, attention), inputs_of(CASES[case], dtype)
    full, (plain, plain_steps) = model(**inputs).logits, generate(model, inputs)
    with dropping(model, everything):
        assert difference(model(**inputs).logits, full) <= TOLERANCE[dtype]
        output, steps = generate(model, inputs)
    assert difference(steps, plain_steps) <= TOLERANCE[dtype]
    total = seen(inputs).shape[1]
    for (rows, size), (all_rows, all_bytes) in zip(cross_cache(output), cross_cache(plain), strict=True):
        assert all_rows == total and rows == CASES[case].cached
        assert size * total == all_bytes * rows, "bytes are to the plain model's as rows are to its rows"


@pytest.mark.parametrize("case", ["image first", "two images side by side"])
def test_images_of_one_tile_cache_a_quarter_of_the_rows(case: str) -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[case])
    with dropping(model, everything):
        output, _ = generate(model, inputs)
    assert [rows * TILES for rows, _ in cross_cache(output)] == [seen(inputs).shape[1]] * len(CROSS)


@every_case
def test_dropping_equals_masking_in_prefill_and_four_decoding_steps(
    case: str, dtype: torch.dtype, attention: str
) -> None:
    model, inputs = model_of(dtype, attention), inputs_of(CASES[case], dtype)
    full = model(**inputs).logits
    prompts: list[CrossAttended] = []
    with dropping(model, lambda prompt: prompts.append(prompt) or uneven(prompt)):
        prefill = model(**inputs).logits
        assert len(prompts) == 1 and torch.equal(prompts[0].tokens, seen(inputs))
        output, steps = generate(model, inputs)
    keep = uneven(prompts[0])
    with masking(model, keep):
        oracle, (masked, masked_steps) = model(**inputs).logits, generate(model, inputs)
    scale = full.abs().max().item()
    assert difference(prefill, full) > 0.1 * scale, "dropping must move the logits, or this proves nothing"
    assert difference(prefill, oracle) <= TOLERANCE[dtype] * scale
    assert steps.shape[1] == NEW and difference(steps, masked_steps) <= TOLERANCE[dtype] * scale
    last = inputs["cross_attention_mask"][:, -1].flatten(1).bool().repeat_interleave(ROWS, 1)
    stored = (keep & last) | ~last.any(1, keepdim=True)
    total, most = keep.shape[1], int(stored.sum(1).max())
    for (rows, size), (all_rows, all_bytes) in zip(cross_cache(output), cross_cache(masked), strict=True):
        assert (rows, all_rows) == (most, total) and size * total == all_bytes * most


def test_text_whose_whole_image_was_dropped_reads_what_masking_gives_it() -> None:
    """Fully masked, all rows weigh alike; and the same where a sample that stores everything keeps the batch long."""
    for case in (CASES["two images apart"], Case([[(3, 1), (9, 1)], []], 0)):
        model, inputs = model_of(torch.float64), inputs_of(case)
        keep = seen(inputs)
        keep[:, : TILES * ROWS] = False  # the first image, which the text between the two alone sees
        with dropping(model, lambda prompt: keep):  # noqa: B023
            prefill, (_, steps) = model(**inputs).logits, generate(model, inputs)
        with masking(model, keep):
            oracle, (_, masked) = model(**inputs).logits, generate(model, inputs)
        assert difference(prefill, oracle) < 1e-9 and difference(steps, masked) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_beams_equal_those_of_the_masked_run(case: str) -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[case])
    settings = {"num_beams": 3, "num_return_sequences": 2}
    prompts: list[CrossAttended] = []
    with dropping(model, lambda prompt: prompts.append(prompt) or uneven(prompt), observe=True):
        output = model.generate(**inputs, **GREEDY, **settings)
    (prompt,) = prompts
    assert prompt.rows_per_sample == settings["num_beams"] and torch.equal(prompt.tokens, seen(inputs))
    assert prompt.states.shape[:2] == prompt.tokens.shape and len(prompt.attention) == len(prompt.tokens)
    assert len(prompt.arguments["pixel_values"]) == len(prompt.tokens) * prompt.rows_per_sample
    with masking(model, uneven(prompt)):
        assert torch.equal(model.generate(**inputs, **GREEDY, **settings), output)


def test_sampled_sequences_equal_those_of_the_masked_run() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES["one or two images, padded"])
    settings = {**GREEDY, "do_sample": True, "num_return_sequences": 3}
    prompts: list[CrossAttended] = []
    with dropping(model, lambda prompt: prompts.append(prompt) or uneven(prompt)):
        torch.manual_seed(1)
        output = model.generate(**inputs, **settings)
    with masking(model, uneven(prompts[0])):
        torch.manual_seed(1)
        assert torch.equal(model.generate(**inputs, **settings), output)
    assert output.shape == (9, LENGTH + 4) and prompts[0].rows_per_sample == 3


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_generating_without_a_cache_equals_generating_with_one(case: str) -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[case])
    choices: list[Tensor] = []
    with dropping(model, lambda prompt: choices.append(top_attended(prompt)) or choices[-1], observe=True):
        output, steps = generate(model, inputs)
        assert len(choices) == 1
        uncached, uncached_steps = generate(model, inputs, use_cache=False)
        assert len(choices) == 1 + NEW
        if case == PADDED:
            assert torch.equal(
                *(model.generate(**inputs, **GREEDY, num_beams=2, use_cache=own) for own in (True, False))
            )
    assert torch.equal(output.sequences, uncached.sequences) and difference(steps, uncached_steps) < 1e-10
    assert all(torch.equal(choices[0], choice) for choice in choices)


def test_two_new_tokens_at_once_and_copies_of_a_cache_decode_alike() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[PADDED])
    sees, more = inputs["cross_attention_mask"], torch.tensor([[5, 6]] * 3)
    longer = {
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1),
        "cross_attention_mask": torch.cat([sees, sees[:, -1:], sees[:, -1:]], 1),
    }
    with dropping(model, uneven):
        cache = cache_of(model(**inputs, use_cache=True))
        once = model(input_ids=more, **longer, **{CACHE: cache}).logits
        cache = cache_of(model(**inputs, use_cache=True))
        cache.batch_repeat_interleave(2)
        longer = {name: value.repeat_interleave(2, 0) for name, value in longer.items()}
        twice = model(input_ids=more.repeat_interleave(2, 0), **longer, **{CACHE: cache}).logits
    assert difference(twice[::2], once) < 1e-10 and difference(twice[1::2], once) < 1e-10


def test_a_sample_does_not_depend_on_its_batch_or_padding() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[PADDED])
    counts: list[list[int]] = []
    with dropping(model, lambda p: counts.append(p.tokens.sum(1).tolist()) or top_attended(p), observe=True):
        together, steps = model(**inputs).logits, generate(model, inputs)[1]
        for row in range(3):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            assert difference(model(**one).logits[0], together[row]) < 1e-10
            assert difference(generate(model, one)[1][0], steps[row]) < 1e-10
            assert difference(generate(model, padded(one, 3, 0, sees=0))[1][0], steps[row]) < 1e-10
            for sees in (0, 1):
                output = model(**padded(one, 0, 3, sees), use_cache=True)
                assert difference(output.logits[0, :LENGTH], together[row]) < 1e-10
                assert cross_cache(output)[0][0] <= 3 * ROWS
    assert counts == [[51, 51, 51]] * 2 + [[51]] * 15


def test_a_choice_of_rows_that_no_text_sees_is_no_choice() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[PADDED])
    full, read = model(**inputs).logits, []
    with dropping(model, lambda prompt: torch.ones_like(prompt.tokens)):
        handle = model.model.language_model.layers[CROSS[1]].cross_attn.k_proj.register_forward_pre_hook(
            lambda module, args: read.append(args[0].shape[1])
        )
        assert difference(model(**inputs, use_cache=True).logits, full) < 1e-10
        handle.remove()
    assert read[0] == 3 * ROWS, "the next layer reads no other rows"


def test_text_without_images_runs_as_it_is() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES["image first"])
    text = {"input_ids": inputs["input_ids"].clamp(max=IMAGE - 1), "attention_mask": inputs["attention_mask"]}
    unseen = inputs_of(Case([[], []], 0))
    plain = [model(**text).logits, generate(model, text)[1], model(**unseen).logits, generate(model, unseen)[1]]

    def nothing(prompt: CrossAttended) -> Tensor:
        assert not prompt.tokens.any(), "there is nothing to choose"
        return prompt.tokens

    with dropping(model, nothing):
        pruned = [model(**text).logits, generate(model, text)[1], model(**unseen).logits, generate(model, unseen)[1]]
    assert all(torch.equal(a, b) for a, b in zip(pruned, plain, strict=True))


def test_the_prompt_shows_what_the_first_layer_pays_each_row() -> None:
    model, inputs = model_of(torch.float32, "eager"), inputs_of(CASES[PADDED], torch.float32)
    plain = model(**inputs, output_attentions=True).attentions[CROSS[0]]  # [B, H, L, T]
    prompts: list[CrossAttended] = []
    with dropping(model, lambda prompt: prompts.append(prompt) or prompt.tokens, observe=True):
        model(**inputs)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, 10:12] = 5
        model(**inputs, labels=labels)
        model(**inputs, labels=inputs["input_ids"])
    is_prompt = (inputs["cross_attention_mask"].flatten(2).any(2) & inputs["attention_mask"].bool()).float()
    before, first = is_prompt * (torch.arange(LENGTH) < 10), is_prompt * (is_prompt.cumsum(1) == 1)
    for prompt, rows in zip(prompts, (is_prompt, before, first), strict=True):
        assert prompt.attention.shape == (3, 4, 2 * TILES * ROWS) and prompt.attention.dtype == torch.float32
        assert difference(prompt.attention, torch.einsum("bl,bhlt->bht", rows, plain)) < 1e-5
        assert not prompt.attention.transpose(1, 2)[~prompt.tokens].any()
        torch.testing.assert_close(prompt.attention.sum(2), rows.sum(1)[:, None].expand(-1, 4))
