"""Merging equals the full run in which the means are written at their places and all tokens that left are masked."""

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.prompt.merging import merge_groups
from tests.support.decoder_oracle import Decoder
from tests.support.families import BY_NAME, ROWS
from tests.support.matrix import KIN, exact, generate, scale
from tests.support.merging import Scripted, entering, groups, merged, of_one_image, policy, script, written
from tests.support.oracles import Inputs, columns_kept, visual_columns
from tests.support.quick import quick
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")
DECODERS = [row for row in ROWS if isinstance(row.oracle, Decoder)]
OTHERS = [row for row in ROWS if not isinstance(row.oracle, Decoder)]
every_decoder = pytest.mark.parametrize("row", quick(DECODERS, {row.name for row in DECODERS} - KIN))


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SELECTORS._own, "scripted", Scripted)


@every_decoder
def test_merging_equals_writing_the_means_in_prefill_and_four_decoding_steps(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    forward = row.oracle.forward_inputs(inputs)
    with prune(model, policy()) as pruning:
        prefill = model(**forward).logits
        tokens, steps = generate(row, model, inputs)
    keep, carrier = pruning.keep, pruning.destination
    sizes = [len(own) for sample in groups(carrier) for own in sample.values()]
    lost = row.oracle.tokens(inputs) & (carrier < 0)
    assert 1 in sizes and max(sizes) > 2 and lost.any(), "groups of one, of several, and tokens that are lost"
    assert len({tuple(sample) for sample in carrier.tolist()}) == len(carrier), "samples differ"
    with merged(row, model, inputs, pruning):
        expected = model(**forward).logits
        expected_tokens, expected_steps = generate(row, model, inputs)
    with prune(model, PruningPolicy(), choose=lambda tokens: keep):
        dropped = model(**forward).logits
    rows, atol = row.oracle.compared(inputs, keep), row.tolerance() * scale(expected)
    assert scale(expected[rows] - dropped[rows]) > 0.1 * scale(expected), "merging must matter, or this proves nothing"
    exact(prefill[rows], expected[rows], atol=atol)
    exact(steps, expected_steps, atol=atol)
    assert torch.equal(tokens, expected_tokens)


@every_decoder
def test_uncached_beams_find_what_the_oracle_finds(row: Row) -> None:
    model, inputs, settings = row.model(), row.inputs(of_one_image(row)), {"num_beams": 2, "use_cache": False}
    with prune(model, policy()) as pruning:
        model(**row.oracle.forward_inputs(inputs))
        keep, carrier = pruning.keep, pruning.destination
        tokens, steps = generate(row, model, inputs, 2, **settings)
    assert torch.equal(pruning.keep, keep) and torch.equal(pruning.destination, carrier), "the prompt's, before beams"
    with merged(row, model, inputs, pruning):
        expected_tokens, expected_steps = generate(row, model, inputs, 2, **settings)
    assert torch.equal(tokens, expected_tokens)
    exact(steps, expected_steps, atol=row.tolerance() * scale(expected_steps))


@pytest.mark.slow
@every_decoder
def test_what_is_merged_does_not_depend_on_the_batch_or_padding(row: Row) -> None:
    everyone = list(range(len(row.samples())))
    model = row.model()
    with prune(model, policy()) as pruning:
        _, together = generate(row, model, row.inputs(everyone), 1)
    keep, carrier, atol = pruning.keep, pruning.destination, row.tolerance() * scale(together)
    for rows, pads in [*(([one], 0) for one in everyone), (everyone[::-1], 4)]:
        with prune(model, policy()) as pruning:
            _, steps = generate(row, model, row.inputs(rows, pads), 1)
        if pruning.destination is not None:  # a sample without an image has nothing to choose from
            width = pruning.destination.shape[1]
            assert torch.equal(pruning.keep, keep[rows, :width])
            assert torch.equal(pruning.destination, carrier[rows, :width])
        exact(steps, together[rows], atol=atol)


@every_decoder
def test_keep_marks_the_rows_that_carry_and_only_those_that_stay_carry(row: Row) -> None:
    model, inputs = row.model(), row.inputs(range(len(row.samples())))
    with prune(model, policy()) as pruning:
        model(**row.oracle.forward_inputs(inputs))
    keep, carrier, tokens = pruning.keep, pruning.destination, row.oracle.tokens(inputs)
    assert carrier.dtype == torch.long and carrier.shape == tokens.shape
    for sample in range(len(tokens)):
        for token in range(tokens.shape[1]):
            lead = int(carrier[sample, token])
            assert bool(keep[sample, token]) == (lead == token)
            assert lead == -1 or (tokens[sample, token] and keep[sample, lead])


def spans(row: Row) -> list[list[tuple[int, int]]]:
    """Where each sample's images, which are all pictures, begin and end among its tokens."""
    found = []
    for sample in row.samples():
        ends = [sum(image.tokens for image in sample.images[: n + 1]) for n in range(len(sample.images))]
        found.append(list(zip([0, *ends[:-1]], ends, strict=True)) if ends else [])
    return found


@pytest.mark.parametrize("name", ["Llava", "Mistral3", "InternVL", "LlavaNext", "LlavaOnevision", "Blip2-OPT"])
@pytest.mark.parametrize("per", ["image", "sample"])
def test_carriers_are_counted_in_the_sample_whatever_the_budget_is_of(name: str, per: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs(range(len(row.samples())))
    with prune(model, policy(per=per)) as pruning:
        model(**row.oracle.forward_inputs(inputs))
    ends = line_ends(row, model, inputs)
    several = 0
    for sample, images in enumerate(spans(row)):
        parts = images if per == "image" else [(images[0][0], images[-1][1])] if images else []
        several += len(images) > 1
        expected = {token: token for token in ends[sample]}
        for start, stop in parts:
            own = [token for token in range(start, stop) if token not in ends[sample]]
            count = -int(-0.25 * len(own) // 1)
            scores = pruning.scores[sample].tolist()
            order = sorted(own, key=lambda token, scores=scores: -scores[token])
            # Scripted looks at places in the row it is given: of the image, or of the sample.
            places = [token - (start if per == "image" else 0) for token in order]
            told = script(places, count + places[0] % 2)
            expected |= {token + order[0] - places[0]: lead + order[0] - places[0] for token, lead in told.items()}
        found = {token: lead for token, lead in enumerate(pruning.destination[sample].tolist()) if lead >= 0}
        assert found == expected
    assert several or name == "Blip2-OPT", "a sample has several images"


def line_ends(row: Row, model: PreTrainedModel, inputs: Inputs) -> list[set[int]]:
    """Places of each sample's newlines among its visual tokens: they stand for no patch."""
    newline = getattr(model.model, "image_newline", None) if hasattr(model, "model") else None
    if newline is None:
        return [set() for _ in inputs["input_ids"]]
    embeds, columns = entering(row, model, inputs)["inputs_embeds"], visual_columns(inputs)
    rows = [own[places] for own, places in zip(embeds, columns, strict=True)]
    return [{token for token, vector in enumerate(own) if torch.equal(vector, newline)} for own in rows]


def test_tokens_without_a_patch_carry_themselves_alone() -> None:
    for name in ("LlavaNext", "LlavaOnevision"):
        row = BY_NAME[name]
        model, inputs = row.model(), row.inputs()
        ends = line_ends(row, model, inputs)
        assert all(ends)
        for per in ("image", "crop", "sample"):
            with prune(model, policy(per=per)) as pruning:
                model(**inputs)
            for own, led in zip(ends, groups(pruning.destination), strict=True):
                assert all(led[token] == [token] for token in own)


def test_crops_merge_within_themselves() -> None:
    """The first image's 14 tokens: four of the whole, then two crops of two columns in two rows with newlines."""
    row = BY_NAME["LlavaNext"]
    with prune(row.model(), policy(per="crop")) as pruning:
        row.model()(**row.inputs())
    crop_of = [0, 0, 0, 0, 1, 1, 2, 2, -1, 1, 1, 2, 2, -2]
    leads = groups(pruning.destination)[0]
    assert {len(own) for own in leads.values()} > {1}, "something is merged"
    for lead, own in leads.items():
        assert {crop_of[token] for token in own} == {crop_of[lead]}
    assert {crop_of[lead] for lead in leads} == {0, 1, 2, -1, -2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "Blip2-OPT", "Qwen2.5-VL", "Gemma3", "Mistral3"])
def test_bfloat16_is_finite_and_a_group_of_one_is_bit_identical(name: str) -> None:
    row, alone = BY_NAME[name], 0
    model = row.model(torch.bfloat16)
    for sample in range(len(row.inputs()["input_ids"])):
        inputs = row.inputs([sample], dtype=torch.bfloat16)
        with prune(model, policy()) as pruning:
            short = entering(row, model, inputs)["inputs_embeds"][0]
            _, steps = generate(row, model, inputs, 2)
        assert steps.isfinite().all()
        full, columns = entering(row, model, inputs)["inputs_embeds"], visual_columns(inputs)
        means, (led,) = written(full, columns, pruning.destination)[0], groups(pruning.destination)
        token_at = {at: token for token, at in enumerate(columns[0].nonzero()[:, 0].tolist())}
        stay = columns_kept(inputs, pruning.keep)[0].nonzero()[:, 0].tolist()
        for at, vector in zip(stay, short, strict=True):
            single = at not in token_at or len(led[token_at[at]]) == 1
            alone += single and at in token_at
            if single:
                assert torch.equal(vector, full[0, at])
            else:  # sums in another order may round another way
                exact(vector, means[at], atol=2**-8 * scale(means[at]))
    assert alone


@pytest.mark.parametrize("row", OTHERS, ids=repr)
def test_where_no_decoder_reads_visual_rows_merging_is_refused(row: Row) -> None:
    where = "cross-attention" if row.name.startswith("Mllama") else "encoder"
    reason = f"'scripted' merges tokens, which is exact where a decoder reads them as rows; .* by {where}"
    with pytest.raises(PruningError, match=reason), prune(row.model(), policy()):
        pass


def test_a_budget_of_one_token_merges_into_one_row_a_sample() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    with prune(model, policy(keep=1, per="sample")) as pruning:
        logits = model(**inputs).logits
    assert pruning.keep.sum(1).max() <= 2
    with merged(row, model, inputs, pruning):
        expected = model(**inputs).logits
    rows = row.oracle.compared(inputs, pruning.keep)
    exact(logits[rows], expected[rows], atol=row.tolerance() * scale(expected))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_lost_token_that_is_not_finite_spoils_no_mean(value: float) -> None:
    values = torch.tensor([[[1.0], [3.0], [value], [5.0]]])
    assert merge_groups(values, torch.tensor([[0, 0, -1, 3]]))[0, [0, 3], 0].tolist() == [2.0, 5.0]
    assert merge_groups(values, torch.tensor([[0, 2, 2, 3]]))[0, [0, 3], 0].tolist() == [1.0, 5.0]


def test_the_record_forgets_what_was_merged_in_the_prompt_before() -> None:
    row = BY_NAME["Llava"]
    with prune(row.model(), policy()) as pruning:
        row.model()(**row.inputs())
        assert pruning.destination is not None
        row.model()(input_ids=torch.full((1, 6), 5), attention_mask=torch.ones(1, 6, dtype=torch.long))
        assert pruning.destination is None and not pruning.keep.any()


def names(rows: Sequence[Row]) -> list[str]:
    return [row.name for row in rows]


def test_the_matrix_has_models_of_every_kind() -> None:
    assert "Qwen3-VL" in names(DECODERS) and len(DECODERS) == len(ROWS) - len(OTHERS) >= 20
    assert {"Blip2-T5", "InstructBlip-T5", "Mllama"} <= {*names(OTHERS)}
