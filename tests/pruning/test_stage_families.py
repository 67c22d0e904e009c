"""Dropping inside the decoder of every type: equal to hiding from later layers, or refused at entry."""

import pytest

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.decoder_oracle import Decoder
from tests.support.families import ROWS
from tests.support.hybrid_families import HYBRID
from tests.support.latest_families import LATEST
from tests.support.layered_families import LAYERED
from tests.support.matrix import MORE, cases
from tests.support.newer_families import NEWER
from tests.support.picture_families import PICTURED
from tests.support.quick import quick
from tests.support.recurrent_oracle import Recurrent
from tests.support.rows import Row
from tests.support.stage_merging import check_merging
from tests.support.stages import check_dropping, deep, three_stages

pytestmark = pytest.mark.usefixtures("no_grad")
STEPS = 10
REFUSED = {
    **dict.fromkeys(("Gemma4", "Gemma4, images see each other"), "hands per_layer_inputs to each layer"),
    "ERNIE-4.5-VL": "hands moe_mm_token_type_ids to each layer",
    **dict.fromkeys(("Qwen3.5", "Qwen3.5-MoE", "LFM2-VL"), "has layers with a recurrent state"),
}


def has_stages(row: Row) -> bool:
    """True if the decoder reads visual tokens as rows, and tokens can leave inside it."""
    return isinstance(row.oracle, Decoder) and row.name not in REFUSED


@pytest.mark.parametrize("row", quick(filter(has_stages, (*ROWS, *MORE)), {"Llava", "Qwen3-VL"}))  # others: test_stages
def test_three_stages_equal_hiding_in_prefill_and_ten_decoding_steps(row: Row) -> None:
    row, stages = three_stages(row)
    check_dropping(row, row.model(), row.inputs(pads=1), stages, 0.01, row.tolerance(), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("row", cases(has_stages))
def test_means_at_three_stages_equal_means_written_into_the_full_run(row: Row) -> None:
    row, stages = three_stages(row)
    check_merging(row, row.model(), row.inputs(pads=1), stages, row.tolerance(), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in (*ROWS, *NEWER, *PICTURED, *LATEST, *LAYERED) if has_stages(row)], ids=repr
)
def test_a_late_stage_alone_equals_hiding_from_later_layers(row: Row) -> None:
    row, stages = three_stages(row)
    check_dropping(row, row.model(), row.inputs(), stages[2:], 0.01, row.tolerance())


@pytest.mark.parametrize("row", [row for row in (*LAYERED, *HYBRID) if not has_stages(row)], ids=repr)
@pytest.mark.parametrize("scorer", ["visual-exit", "sparsevlm"])
def test_types_whose_layers_cannot_lose_rows_are_refused_at_entry(row: Row, scorer: str) -> None:
    assert isinstance(row.oracle, Decoder | Recurrent)
    with pytest.raises(PruningError, match=REFUSED[row.name]), prune(deep(row).model(), PruningPolicy(scorer)):
        pass
