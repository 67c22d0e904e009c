"""The head of a pruned model: it is run on the rows that were kept, unless it makes something of zeros."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catp_lightning import PruningPolicy, prune
from catp_lightning.models import find_family
from tests.support.decoder_oracle import Decoder
from tests.support.families import BY_NAME
from tests.support.matrix import every_row, exact, uneven
from tests.support.oracles import columns_kept
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")


def rows_read(head: nn.Module, call: Any) -> tuple[Any, list[int]]:
    """Return what a call returns, and the numbers of rows of a batch that a head was given."""
    seen: list[int] = []
    own = head.forward
    head.forward = lambda hidden: (seen.append(hidden.shape[1]), own(hidden))[1]
    try:
        return call(), seen
    finally:
        del head.forward


@every_row
def test_the_head_reads_the_rows_that_were_kept(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    if not isinstance(row.oracle, Decoder) or "labels" in inputs:
        pytest.skip("all rows of the decoder stay, or its prompt is another part's")
    forward, head = row.oracle.forward_inputs(inputs), model.get_output_embeddings()
    full, before = rows_read(head, lambda: model(**forward))

    read: list[int] = []

    def pruned() -> Any:
        with prune(model, PruningPolicy(keep=0.5), choose=uneven()):
            *_, last = find_family(model).decoder.get_submodule("layers").children()
            with last.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1])):
                return model(**forward)

    short, after = rows_read(head, pruned)
    assert after == read < before
    assert short.logits.shape == full.logits.shape


def llava(bias: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    row = BY_NAME["Llava"]
    model: Any = copy.deepcopy(row.model())
    if bias:
        old = model.lm_head
        model.lm_head = nn.Linear(old.in_features, old.out_features, device="cpu", dtype=old.weight.dtype)
        model.lm_head.weight = old.weight
    return model, row.inputs()


def test_a_head_with_a_bias_reads_all_rows() -> None:
    model, inputs = llava(bias=True)
    with prune(model, PruningPolicy("position", keep=0.5)) as pruning:
        logits, seen = rows_read(model.lm_head, lambda: model(**inputs).logits)
    assert seen == [inputs["input_ids"].shape[1]]
    dropped = ~columns_kept(inputs, pruning.keep)
    assert dropped.any() and torch.equal(logits[dropped], model.lm_head.bias.expand_as(logits[dropped]))


def test_hooks_on_the_head_see_all_rows() -> None:
    model, inputs = llava(bias=False)
    seen: list[tuple[int, int]] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: seen.append((args[0].shape[1], out.shape[1])))
    with handle, prune(model, PruningPolicy("position", keep=0.5)):
        model(**inputs)
    assert seen == [(inputs["input_ids"].shape[1],) * 2]


def test_other_calls_of_the_head_are_what_they_are() -> None:
    model, inputs = llava(bias=False)
    other = torch.randn(1, 3, model.lm_head.in_features, device="cpu", dtype=model.lm_head.weight.dtype)
    with prune(model, PruningPolicy("position", keep=0.5)):
        hidden = model.model(**inputs).last_hidden_state
        exact(model.lm_head(other), other @ model.lm_head.weight.T, atol=1e-10)
        exact(model.lm_head(2 * hidden), 2 * model.lm_head(hidden), atol=1e-10)
        exact(model.lm_head(hidden[:, -1:]), model.lm_head(hidden)[:, -1:], atol=1e-10)
