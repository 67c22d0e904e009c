"""Llama-3.2-Vision: rows that no text sees are never stored, and dropping rows equals masking them, everywhere."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MllamaConfig, MllamaForConditionalGeneration, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Signal
from catp_lightning.models.mllama import Mllama
from catp_lightning.prompt.prompt import CrossAttended
from catp_lightning.pruning.sites.cross_attention import PruneCrossAttention
from catp_lightning.utils.hashing import fingerprint
from tests.support.footprints import footprint
from tests.support.steps import difference, stepwise

pytestmark = pytest.mark.usefixtures("no_grad")


IMAGE, PAD, LENGTH, TILES, ROWS = 99, 0, 14, 4, 17  # 16 patches and [CLS] in a tile
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CROSS = [1, 3, 5]
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "suppress_tokens": [IMAGE]}
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Where each sample has its images: (column, tiles used) each; and how many columns at its left are padding.

    `cached` is how many rows the cache holds: those that the last text row of any sample sees.
    """

    samples: list[list[tuple[int, int]]]
    cached: int
    pads: int = 0
    blind_end: int = 0  # the last columns of the last sample see nothing


CASES = {
    "image first": Case([[(0, 1)]] * 3, ROWS),
    "image in the middle": Case([[(6, 1)]] * 3, ROWS),
    "other tiles in every sample": Case([[(6, 1)], [(4, 2)], [(5, 2)]], 2 * ROWS),
    "two images side by side": Case([[(3, 1), (4, 1)]] * 2, 2 * ROWS),
    "two images apart": Case([[(3, 1), (9, 1)]] * 2, ROWS),
    "one or two images, padded": Case([[(5, 1), (9, 2)], [(6, 3)], [(3, 2), (4, 1)]], 3 * ROWS, pads=2),
    "every tile used": Case([[(2, 4)], [(6, 4)]], 4 * ROWS),
    "a sample without an image": Case([[(5, 1)], [], [(3, 2)]], 4 * ROWS),
    "an image that the end does not see": Case([[(5, 1)], [(2, 2)]], 4 * ROWS, blind_end=4),
}


@cache
def model_of(dtype: torch.dtype, attention: str = "sdpa") -> MllamaForConditionalGeneration:
    """Open gates and sharp attention: a row more or less must move the logits, or a test proves nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = MllamaVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            image_size=32,
            patch_size=8,
            max_num_tiles=TILES,
            vision_output_dim=64,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [2, 2]],
        )
        text = MllamaTextConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            cross_attention_layers=CROSS,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.15,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
        model = MllamaForConditionalGeneration(
            MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        ).eval()
        for layer in (model.model.language_model.layers[n] for n in CROSS):
            layer.cross_attn_attn_gate.data.fill_(1.0), layer.cross_attn_mlp_gate.data.fill_(1.0)
            layer.cross_attn.q_norm.weight.data.fill_(1.5), layer.cross_attn.k_norm.weight.data.fill_(1.5)
        model.model.multi_modal_projector.weight.data.normal_(0, 0.3)
        model.to(dtype).set_attn_implementation(attention)
        model.generation_config.pad_token_id = PAD
    return model


def inputs_of(case: Case, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> Inputs:
    """As the processor makes them: text sees an image up to the next one, neighbours together to the end."""
    batch, images = len(case.samples), max(1, *map(len, case.samples))
    ids = torch.randint(3, IMAGE - 1, (batch, length))
    mask, sees = torch.ones_like(ids), torch.zeros(batch, length, images, TILES, dtype=torch.long)
    ratio, present = torch.zeros(batch, images, dtype=torch.long), torch.zeros(batch, images, TILES, dtype=torch.long)
    present[:, :, 0] = 1  # as the processor marks a missing image
    for row, own in enumerate(case.samples):
        for index, (column, used) in enumerate(own):
            after = own[index + 1][0] if index + 1 < len(own) else length
            ids[row, column] = IMAGE
            sees[row, column : length if after == column + 1 else after, index, :used] = 1
            ratio[row, index], present[row, index] = used, (torch.arange(TILES) < used).long()
    ids[0, : case.pads], mask[0, : case.pads] = PAD, 0
    if case.blind_end:
        sees[-1, -case.blind_end :] = 0
    pixels = torch.randn(batch, images, TILES, 3, 32, 32) * present[..., None, None, None]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "cross_attention_mask": sees,
        "pixel_values": pixels.to(dtype),
        "aspect_ratio_ids": ratio,
        "aspect_ratio_mask": present,
    }


def seen(inputs: Inputs) -> Tensor:
    """Rows that some text sees: bool [B, T]."""
    sees = inputs["cross_attention_mask"].bool() & inputs["attention_mask"].bool()[:, :, None, None]
    return sees.any(1).flatten(1).repeat_interleave(ROWS, 1)


def everything(prompt: CrossAttended) -> Tensor:
    return prompt.tokens


def uneven(prompt: CrossAttended) -> Tensor:
    """Each sample keeps another share of each of its images, scattered."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(prompt.tokens.shape, generator=generator)
    shares = torch.tensor([0.2, 0.7, 0.4])[: len(scores), None]
    return (scores < shares) & prompt.tokens


@contextmanager
def dropping(model: nn.Module, choose: Callable[[CrossAttended], Tensor], **more: Any) -> Iterator[PruneCrossAttention]:
    rows = PruneCrossAttention(Mllama(model), choose, **more)
    with rows.dropping():
        yield rows


@contextmanager
def masking(model: nn.Module, keep: Tensor, prompt: int = LENGTH) -> Iterator[None]:
    """The oracle: the dropped rows are masked for text that sees an image; the prompt sees them in the first layer."""

    def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask, sees = kwargs["cross_attention_mask"], kwargs["full_text_row_masked_out_mask"].bool()
        gone = ~keep.repeat_interleave(len(mask) // len(keep), 0)[:, None, None] & sees
        if layer.layer_idx == CROSS[0]:
            length = mask.shape[2]  # shorter than the prompt: a decoding step
            gone = gone & ((torch.arange(length) >= prompt) | (length < prompt))[:, None]
        return args, {**kwargs, "cross_attention_mask": mask.masked_fill(gone, torch.finfo(mask.dtype).min)}

    layers = [model.model.language_model.layers[n] for n in CROSS]
    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generate(model: nn.Module, inputs: Mapping[str, Any], **settings: Any) -> Any:
    """Sequences with their cache, and the logits of every step."""
    return stepwise(model, inputs, **{**GREEDY, **settings}, return_dict_in_generate=True)


def cross_cache(output: Any) -> list[tuple[int, int]]:
    """Rows and bytes that each cross-attention layer has cached."""
    layers = [output.past_key_values.layers[n] for n in CROSS]
    return [(layer.keys.shape[2], layer.keys.nbytes + layer.values.nbytes) for layer in layers]


@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.float64, "sdpa"), (torch.float32, "sdpa"), (torch.float32, "eager")], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_no_text_sees_are_never_stored_and_nothing_changes(
    case: str, dtype: torch.dtype, attention: str
) -> None:
    model, inputs = model_of(dtype, attention), inputs_of(CASES[case], dtype)
    full, (plain, plain_steps) = model(**inputs).logits, generate(model, inputs)
    beams = model.generate(**inputs, **GREEDY, num_beams=3)
    with dropping(model, everything):
        assert difference(model(**inputs).logits, full) <= TOLERANCE[dtype]
        output, steps = generate(model, inputs)
        assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=3), beams)
    assert difference(steps, plain_steps) <= TOLERANCE[dtype]
    total = seen(inputs).shape[1]
    for (rows, size), (all_rows, all_bytes) in zip(cross_cache(output), cross_cache(plain), strict=True):
        assert all_rows == total and rows == CASES[case].cached
        assert size * total == all_bytes * rows, "bytes are to the plain model's as rows are to its rows"


@pytest.mark.parametrize(
    ("case", "share"), [("image first", 4), ("image in the middle", 4), ("two images side by side", 4)]
)
def test_images_of_one_tile_cache_a_quarter_of_the_rows(case: str, share: int) -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[case])
    with dropping(model, everything):
        output, _ = generate(model, inputs)
    assert [rows * share for rows, _ in cross_cache(output)] == [seen(inputs).shape[1]] * 3


@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.float64, "sdpa"), (torch.float32, "sdpa"), (torch.float32, "eager")], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_dropping_equals_masking_in_prefill_and_seven_decoding_steps(
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
    assert steps.shape[1] == 7 and difference(steps, masked_steps) <= TOLERANCE[dtype] * scale
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
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_equal_those_of_the_masked_run(case: str, settings: dict[str, Any]) -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[case])
    prompts: list[CrossAttended] = []
    with dropping(model, lambda prompt: prompts.append(prompt) or uneven(prompt), observe=True):
        output = model.generate(**inputs, **GREEDY, **settings)
    (prompt,) = prompts
    assert prompt.beams == settings["num_beams"] and torch.equal(prompt.tokens, seen(inputs))
    assert prompt.states.shape[:2] == prompt.tokens.shape and len(prompt.attention) == len(prompt.tokens)
    assert len(prompt.arguments["pixel_values"]) == len(prompt.tokens) * prompt.beams
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
    assert output.shape == (9, LENGTH + 7) and prompts[0].beams == 3


def top_attended(prompt: CrossAttended) -> Tensor:
    """A choice by the text's attention: the same with and without a cache only if it is the prompt's alone."""
    paid = prompt.attention.sum(1).masked_fill(~prompt.tokens, -1)
    counts = (prompt.tokens.sum(1, keepdim=True) * 0.3).ceil()
    image = torch.arange(paid.shape[1]).div(TILES * ROWS, rounding_mode="floor")
    best = torch.stack([paid.masked_fill(image != i, -1).amax(1) for i in range(int(image.max()) + 1)], 1)
    top = paid.argsort(1, descending=True).argsort(1) < counts
    return (top | (paid == best[:, image])) & prompt.tokens


@pytest.mark.parametrize("case", CASES)
def test_generating_without_a_cache_equals_generating_with_one(case: str) -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[case])
    choices: list[Tensor] = []
    with dropping(model, lambda prompt: choices.append(top_attended(prompt)) or choices[-1], observe=True):
        output, steps = generate(model, inputs)
        assert len(choices) == 1
        uncached, uncached_steps = generate(model, inputs, use_cache=False)
        beams = [model.generate(**inputs, **GREEDY, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(output.sequences, uncached.sequences) and difference(steps, uncached_steps) < 1e-10
    assert torch.equal(*beams)
    assert len(choices) == 1 + 7 + 1 + 7 and all(torch.equal(choices[0], choice) for choice in choices)


@pytest.mark.parametrize("case", CASES)
def test_a_decoding_loop_by_hand_equals_generate(case: str) -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES[case])
    with dropping(model, uneven):
        sequences, steps = generate(model, inputs)[0].sequences, generate(model, inputs)[1]
        mask, sees = inputs["attention_mask"], inputs["cross_attention_mask"]
        output = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        for step in range(7):
            assert difference(output.logits[:, -1], steps[:, step]) < 1e-10
            mask, sees = torch.cat([mask, mask[:, -1:]], 1), torch.cat([sees, sees[:, -1:]], 1)
            output = model(
                input_ids=sequences[:, LENGTH + step][:, None],
                attention_mask=mask,
                cross_attention_mask=sees,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -1:],
                past_key_values=output.past_key_values,
            )


def test_two_new_tokens_at_once_and_copies_of_a_cache_decode_alike() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES["one or two images, padded"])
    sees, more = inputs["cross_attention_mask"], torch.tensor([[5, 6]] * 3)
    longer = {
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1),
        "cross_attention_mask": torch.cat([sees, sees[:, -1:], sees[:, -1:]], 1),
    }
    with dropping(model, uneven):
        cache = model(**inputs, use_cache=True).past_key_values
        once = model(input_ids=more, **longer, past_key_values=cache).logits
        cache = model(**inputs, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        longer = {name: value.repeat_interleave(2, 0) for name, value in longer.items()}
        twice = model(input_ids=more.repeat_interleave(2, 0), **longer, past_key_values=cache).logits
    assert difference(twice[::2], once) < 1e-10 and difference(twice[1::2], once) < 1e-10


def padded(inputs: Inputs, left: int, right: int, sees: int) -> Inputs:
    """The same samples with more padding, which sees every tile or none."""
    text = {"input_ids": PAD, "attention_mask": 0, "cross_attention_mask": sees}
    pads = {name: [0, 0] * (inputs[name].dim() - 2) + [left, right] for name in text}
    return {**inputs, **{name: nn.functional.pad(inputs[name], pads[name], value=text[name]) for name in text}}


def test_a_sample_does_not_depend_on_its_batch_or_padding() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES["one or two images, padded"])
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
    model, inputs = model_of(torch.float64), inputs_of(CASES["one or two images, padded"])
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
    model, inputs = model_of(torch.float32, "eager"), inputs_of(CASES["one or two images, padded"], torch.float32)
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


def test_labels_give_the_loss_of_the_masked_run_and_none_is_left_out() -> None:
    model, inputs = model_of(torch.float64), inputs_of(CASES["one or two images, padded"])
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    with dropping(model, uneven) as rows:
        loss = model(**inputs, labels=labels).loss
    keep = uneven(CrossAttended(seen(inputs), {}, 1, labels, None, {}))
    with masking(model, keep):
        assert abs(model(**inputs, labels=labels).loss - loss) < 1e-10
    assert abs(model(**inputs, labels=labels).loss - loss) > 1e-3
    assert rows.labels_left_out == 0


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

    forgotten: list[None] = []
    last = model.model.language_model.layers[-1].mlp
    with pytest.raises(KeyError, match="on purpose"):
        choose = fail if where == "choose" else uneven
        with dropping(model, choose, forget=lambda: forgotten.append(None)) as rows:
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
    assert len(forgotten) == (where == "choose")


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
        given = {"attention_mask": mask, "cross_attention_mask": self.grown(-1), "past_key_values": cache, **changes}
        return model(input_ids=torch.tensor([[5], [6]]), **given)

    def test_a_static_cache(self, model: nn.Module) -> None:
        with pytest.raises(PruningError, match="static cache"):
            model(**self.inputs, past_key_values=StaticCache(model.config.text_config, max_cache_len=300))

    def test_a_cache_of_other_layers(self, model: nn.Module) -> None:
        class Own(DynamicLayer):
            pass

        cache = DynamicCache(config=model.config.text_config)
        cache.layers[1] = Own()
        with pytest.raises(PruningError, match="cache of Own cannot be pruned"):
            model(**self.inputs, past_key_values=cache)

    def test_a_cache_that_was_filled_unpruned(self, model: nn.Module) -> None:
        self.rows.active = False
        cache = model(**self.inputs, use_cache=True).past_key_values
        self.rows.active = True
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            self.step(model, cache)

    def test_a_cache_of_an_earlier_prompt(self, model: nn.Module) -> None:
        cache = model(**self.inputs, use_cache=True).past_key_values
        model(**self.inputs, use_cache=True)
        with pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            self.step(model, cache)

    def test_a_cache_of_an_earlier_context(self, model: nn.Module) -> None:
        rows = PruneCrossAttention(Mllama(model), uneven)
        self.rows.active = False
        with rows.dropping():
            cache = model(**self.inputs, use_cache=True).past_key_values
        with rows.dropping(), pytest.raises(PruningError, match="not filled by the last pruned prompt"):
            self.step(model, cache)
        self.rows.active = True

    def test_a_cache_that_was_cropped(self, model: nn.Module) -> None:
        cache = model(**self.inputs, use_cache=True).past_key_values
        cache.crop(-1)
        with pytest.raises(PruningError, match="or was changed since"):
            self.step(model, cache)

    def test_an_image_on_top_of_a_pruned_cache(self, model: nn.Module) -> None:
        cache = model(**self.inputs, use_cache=True).past_key_values
        with pytest.raises(PruningError, match="cannot be added"):
            images = {name: self.inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
            self.step(model, cache, **images)

    def test_a_call_without_cross_attention_mask(self, model: nn.Module) -> None:
        with pytest.raises(PruningError, match="without cross_attention_mask"):
            model(**{**self.inputs, "cross_attention_mask": None})
        cache = model(**self.inputs, use_cache=True).past_key_values
        with pytest.raises(PruningError, match="extended by its last row at every decoding step"):
            self.step(model, cache, cross_attention_mask=None)

    @pytest.mark.parametrize("column", [0, 4], ids=["nothing", "the first image"])
    def test_a_decoding_step_that_sees_what_the_prompt_did_not_at_its_end(self, model: nn.Module, column: int) -> None:
        cache = model(**self.inputs, use_cache=True).past_key_values
        with pytest.raises(PruningError, match="sees other tiles than the last row"):
            self.step(model, cache, cross_attention_mask=self.grown(column))

    def test_a_choice_without_the_image_that_the_answer_reads(self, model: nn.Module) -> None:
        self.rows.choose = lambda prompt: prompt.tokens & (torch.arange(prompt.tokens.shape[1]) < TILES * ROWS)
        with pytest.raises(PruningError, match="at least one row of every image"):
            model(**self.inputs)
        self.rows.choose = uneven


class TestFamily:
    def test_it_knows_the_parts_of_its_model(self) -> None:
        family = Mllama(model_of(torch.float64))
        assert dict(family.shape()) == {"cross_attention_layers": 3, "heads": 4, "rows_per_tile": 17, "tiles": 4}
        assert Mllama.handles(family.model) and not Mllama.handles(family.model.model)
        assert family.placeholder_ids == (IMAGE,) and family.describe()["type"] == "mllama"
        assert [module.layer_idx for module in family.cross_attention] == CROSS

    def test_flash_attention_is_refused(self) -> None:
        model = MllamaForConditionalGeneration(copy.deepcopy(model_of(torch.float64).config))
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(PruningError, match=r"flash_attention_2.*'eager' or 'sdpa'"):
            Mllama(model)

    def test_signals_are_of_the_images_that_text_sees(self) -> None:
        """Images of one to three tiles in three samples: their rows, in order, are the tokens of the batch."""
        model, inputs = model_of(torch.float64), inputs_of(CASES["one or two images, padded"])
        prompts: list[CrossAttended] = []
        with dropping(model, lambda prompt: prompts.append(prompt) or prompt.tokens, observe=True):
            model.generate(**inputs, **GREEDY, num_beams=2)
        wanted = frozenset({Signal.IMAGE_FEATURES, Signal.IMAGE_HASH})
        observed = Mllama(model).observation({}, wanted, prompts[0])
        assert observed.valid.sum(1).tolist() == [17, 34, 51, 34, 17] and observed.valid.shape == (5, 68)
        assert torch.equal(prompts[0].states[prompts[0].tokens], observed[Signal.IMAGE_FEATURES][observed.valid])
        attention = observed.by_layer(Signal.CROSS_ATTENTION_TO_IMAGE)[:, 0].transpose(1, 2)[observed.valid]
        assert torch.equal(prompts[0].attention.transpose(1, 2)[prompts[0].tokens], attention)
        pixels = torch.stack([inputs["pixel_values"][row, n] for row, n in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1))])
        assert torch.equal(observed[Signal.IMAGE_HASH], fingerprint(pixels))
        assert observed.crops.unique().tolist() == [0, 1, 2, 3]
