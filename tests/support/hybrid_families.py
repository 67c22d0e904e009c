"""More rows of the matrix: models whose decoder has layers with a recurrent state."""

from functools import partial

from tests.support.families import QWEN_INPUTS, QWEN_LACKS, WRAP
from tests.support.grid_models import apart, grid, grids
from tests.support.hybrid_models import lfm2_vl, qwen3_5, qwen3_5_moe, spreads
from tests.support.recurrent_oracle import Recurrent
from tests.support.rows import Row
from tests.support.samples import prompts

IN_STATES = 1e-5  # the gated delta rule is computed in float32; tests/models/test_hybrids.py shows it exact in float64
HYBRID = [
    Row(
        "Qwen3.5",
        qwen3_5,
        lambda: prompts(grids(*apart(grid(2, 4, 4, 3))), wrap=WRAP),
        Recurrent(coordinates=True),
        QWEN_INPUTS,
        coarse=IN_STATES,
        lacks=QWEN_LACKS,
    ),
    Row(
        "Qwen3.5-MoE",
        qwen3_5_moe,
        lambda: prompts(grids(grid(1, 6, 6, 3)), wrap=WRAP),
        Recurrent(coordinates=True),
        QWEN_INPUTS,
        coarse=IN_STATES,
        lacks=QWEN_LACKS,
    ),
    Row("LFM2-VL", partial(lfm2_vl, "conv", "full_attention", "conv"), lambda: prompts(spreads()), Recurrent()),
]
