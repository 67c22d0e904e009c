"""Methods that choose inside the decoder, in models: budgets, calibrated heads, and what is refused."""

from typing import Any

import pytest
import torch

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.methods.budget import keep_count
from tests.support.families import BY_NAME
from tests.support.oracles import cache_of
from tests.support.rows import Row
from tests.support.stages import LLAMA, QWEN, model_of

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("row", [LLAMA, QWEN], ids=repr)
def test_sparsevlm_ends_at_the_budget_with_recycled_tokens_in_it(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    with prune(model, PruningPolicy(scorer="sparsevlm", keep=0.3)) as pruning:
        cache = cache_of(model(**inputs, use_cache=True))
    counts = row.oracle.tokens(inputs).sum(1)
    assert pruning.keep is not None and pruning.destination is not None
    assert pruning.keep.sum(1).tolist() == [keep_count(0.3, count) for count in counts.tolist()]
    itself = torch.arange(pruning.keep.shape[1])
    assert torch.equal(pruning.destination == itself, pruning.keep), "those that stay carry themselves"
    assert (pruning.destination >= 0).sum() > pruning.keep.sum(), "and some carry others"
    lengths = [cache.get_seq_length(layer) for layer in range(4)]
    assert lengths[0] > lengths[1] > lengths[2] == lengths[3]  # stages 1 and 2


def test_a_choice_follows_a_calibrated_policys_heads() -> None:
    model, inputs = model_of(LLAMA), LLAMA.inputs()
    kept = []
    for weights in ([[1.0, 0, 0, 0]], [[-1.0, 0, 0, 0]]):
        args = {"head_weights": weights, "stages_at": [2]}
        with prune(model, PruningPolicy(scorer="sparsevlm", scorer_args=args, selector="top-k", keep=2)) as pruning:
            model(**inputs)
        kept.append(pruning.keep)
    assert not (kept[0] & kept[1]).any()


@pytest.mark.parametrize(
    ("scorer", "args", "says"),
    [
        ("sparsevlm", {"schedule": "half"}, "schedule of scorer 'sparsevlm' is 'half'; allowed is 'budget' or 'rank'"),
        ("sparsevlm", {"scale": 0.0}, "scale is 0.0.*above 0"),
        ("dart", {"layer": 0}, "layer is 0.*at least 1"),
        ("visual-exit", {"layer": 0}, "layer is 0.*at least 1, or None"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(scorer: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        PruningPolicy(scorer=scorer, scorer_args=args)


@pytest.mark.parametrize("scorer", ["sparsevlm", "dart", "visual-exit"])
def test_a_model_that_reads_no_visual_tokens_as_rows_is_refused(scorer: str) -> None:
    model = BY_NAME["Mllama"].model()
    with (
        pytest.raises(PruningError, match=r"reads them by cross-attention.*docs/methods.md"),
        prune(model, PruningPolicy(scorer=scorer)),
    ):
        pass
