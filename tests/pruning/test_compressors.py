"""A compressor's rows equal the full run in which they stand at the kept tokens' places and the rest is masked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.methods.scorers import Compressor
from catp_lightning.methods.scorers.trained import Compressor as Base
from catp_lightning.policy import Stage
from tests.support.compressors import COMPRESSORS, compressor, placed, policy_for
from tests.support.decoder_oracle import Decoder
from tests.support.families import BY_NAME, ROWS
from tests.support.matrix import exact, generate, scale
from tests.support.merging import of_one_image
from tests.support.oracles import hooked, visual_columns
from tests.support.rows import Row
from tests.support.stages import OPT, model_of

pytestmark = pytest.mark.usefixtures("no_grad")
DECODERS = [row for row in ROWS if isinstance(row.oracle, Decoder)]
OTHERS = [row for row in ROWS if not isinstance(row.oracle, Decoder)]
QUICK = ("Llava", "LlavaNext", "Qwen2.5-VL", "Qwen3-VL", "Blip2-OPT", "Gemma3")
CASES = [
    pytest.param(row, name, id=f"{row}-{name}", marks=() if row.name in QUICK else pytest.mark.slow)
    for row in DECODERS
    for name in COMPRESSORS
]


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Rows [I, T, D] that compressors write while inside."""
    found: list[Tensor] = []
    plain = Base.written

    def written(self: Compressor, *args: object) -> Tensor:
        found.append(plain(self, *args))  # type: ignore[arg-type]
        return found[-1]

    with monkeypatch.context() as patched:
        patched.setattr(Base, "written", written)
        yield found


def of_samples(rows: Tensor, counts: list[int], keep: Tensor) -> Tensor:
    """Rows of images one after the other, [N, D], as those of samples, [B, T, D]."""
    found = rows.new_zeros(*keep.shape, rows.shape[-1])
    for number, part in enumerate(rows.split(counts)):
        found[number, : len(part)] = part
    return found


@pytest.mark.parametrize(("row", "name"), CASES)
def test_it_equals_the_run_with_its_rows_in_place_and_the_rest_masked(
    row: Row, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = row.model(), row.inputs()
    forward = row.oracle.forward_inputs(inputs)
    policy = policy_for(model, name)
    with watched(monkeypatch) as seen, prune(model, policy) as pruning:
        prefill = model(**forward).logits
        tokens, steps = generate(row, model, inputs, 10)
    keep, counts = pruning.keep, visual_columns(inputs).sum(1).tolist()
    assert keep is not None and keep.sum() < sum(counts), "tokens leave"
    entered: dict[str, Tensor] = {}
    with hooked([model.get_submodule(row.oracle.path)], lambda m, args, kwargs: entered.update(kwargs) or {}):
        model(**forward)
    own = entered["inputs_embeds"][visual_columns(inputs)]
    flat = seen[0][seen[0].abs().sum(-1) > 0] if len(seen[0].flatten(0, 1)) != len(own) else seen[0].flatten(0, 1)
    assert flat.shape == own.shape and scale(flat - own) > 0.1 * scale(own), "rows are far from the tokens"
    rows = of_samples(flat, counts, keep)
    with placed(row, model, inputs, keep, rows):
        expected = model(**forward).logits
        expected_tokens, expected_steps = generate(row, model, inputs, 10)
    with prune(model, PruningPolicy(), choose=lambda tokens: keep):
        dropped = model(**forward).logits
    compared, atol = row.oracle.compared(inputs, keep), row.tolerance() * scale(expected)
    assert scale(expected[compared] - dropped[compared]) > 0.01 * scale(expected), "rows matter"
    exact(prefill[compared], expected[compared], atol=atol)
    exact(steps, expected_steps, atol=atol)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "name"), CASES)
def test_what_it_writes_does_not_depend_on_the_batch_or_padding(row: Row, name: str) -> None:
    everyone = list(range(len(row.samples())))
    model = row.model()
    policy = policy_for(model, name)
    with prune(model, policy) as pruning:
        _, together = generate(row, model, row.inputs(everyone), 1)
    keep, atol = pruning.keep, row.tolerance(moved=True) * scale(together)
    assert keep is not None
    for rows, pads in [*(([one], 0) for one in everyone), (everyone[::-1], 4)]:
        with prune(model, policy) as pruning:
            _, steps = generate(row, model, row.inputs(rows, pads), 1)
        assert pruning.keep is not None
        assert torch.equal(pruning.keep, keep[rows, : pruning.keep.shape[1]])
        exact(steps, together[rows], atol=atol)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_beams_read_the_same_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs(of_one_image(row)[:2])
    with watched(monkeypatch) as seen, prune(model, policy_for(model, name)) as pruning:
        tokens, steps = generate(row, model, inputs, 2, num_beams=2)
    keep = pruning.keep
    assert keep is not None and len(seen) == 1
    rows = of_samples(seen[0].flatten(0, 1), visual_columns(inputs).sum(1).tolist(), keep)
    with placed(row, model, inputs, keep, rows):
        expected_tokens, expected_steps = generate(row, model, inputs, 2, num_beams=2)
    assert torch.equal(tokens, expected_tokens)
    exact(steps, expected_steps, atol=row.tolerance() * scale(expected_steps))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_each_image_gets_as_many_rows_as_the_policy_says_or_stays_as_it_is(name: str) -> None:
    row = BY_NAME["Qwen2.5-VL"]
    model, inputs = row.model(), row.inputs()
    counts = visual_columns(inputs).sum(1)
    full = model(**inputs).logits
    with prune(model, policy_for(model, name, tokens=int(counts.max()) + 1)) as pruning:
        whole = model(**inputs).logits
    assert pruning.keep is not None and torch.equal(pruning.keep.sum(1), counts) and torch.equal(whole, full)


def test_what_it_wrote_may_leave_inside_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of(OPT), OPT.inputs()
    policy = replace(policy_for(model, "quecc"), then=(Stage("fastv", {"layer": 2}, keep=2),))
    with watched(monkeypatch) as seen, prune(model, policy) as pruning:
        prefill = model(**inputs).logits
        tokens, steps = generate(OPT, model, inputs)
    last, first = pruning.keep, None
    with prune(model, policy_for(model, "quecc")) as alone:
        model(**inputs)
        first = alone.keep
    assert first is not None and last is not None and (last & ~first).sum() == 0
    assert last.sum(1).tolist() != first.sum(1).tolist()
    rows = of_samples(seen[0].flatten(0, 1), visual_columns(inputs).sum(1).tolist(), first)
    with placed(OPT, model, inputs, first, rows, ((0, 2), [first, last])):
        expected = model(**inputs).logits
        expected_tokens, expected_steps = generate(OPT, model, inputs)
    compared, atol = OPT.oracle.compared(inputs, last), OPT.tolerance() * scale(expected)
    exact(prefill[compared], expected[compared], atol=atol)
    exact(steps, expected_steps, atol=atol)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("row", OTHERS, ids=repr)
def test_where_no_decoder_reads_visual_rows_it_is_refused(row: Row) -> None:
    policy = PruningPolicy(**compressor(on_grid=False))
    refused = "writes rows that a decoder reads|does not show|has no"
    with pytest.raises(PruningError, match=refused), prune(row.model(), policy):
        pass


def test_what_it_cannot_do_is_refused_with_what_to_do() -> None:
    model, fields = BY_NAME["Llava"].model(), compressor()
    for changes, says in (
        ({"scorer_args": {}}, r"'quecc' has no weights. Train some, trainer.fit\(CompressorTraining"),
        ({"keep": 4}, "was trained to write 3 tokens an image, and keep is 4. Give keep=3, or train"),
        ({"keep": 0.5}, "was trained to write 3 tokens an image, and keep is 0.5"),
        ({"selector": "dpp"}, "itself says at whose places its rows are written: leave selector"),
        ({"selector_args": {"per": "sample"}}, "leave selector and selector_args out"),
    ):
        with pytest.raises(PruningError, match=says), prune(model, PruningPolicy(**{**fields, **changes})):
            pass
    other = PruningPolicy(**compressor(features=16))
    with (
        prune(model, other),
        pytest.raises(ValueError, match="trained for rows of 16 dimensions; this model's have 32"),
    ):
        model(**BY_NAME["Llava"].inputs())


def test_everything_kept_is_the_unpruned_model() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    with prune(model, PruningPolicy(**{**compressor(), "keep": 1.0})):
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
