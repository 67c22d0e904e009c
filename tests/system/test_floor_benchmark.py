"""The benchmark against floor runs: what a floor does, by torch's counter of FLOPs, and a run of the whole."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench.__main__ import main
from benchmarks.bench.floor import Floor, Runs, ratio
from benchmarks.bench.shapes import llava, prompt
from catp_lightning import PruningPolicy
from catp_lightning.pricing import Prices, Prompts

CPU = torch.device("cpu")


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    "policy", [PruningPolicy("stride", keep=0.25), PruningPolicy("pyramiddrop", {"stages_at": [1, 3]}, keep=0.1)]
)
def test_a_floor_run_does_the_work_of_the_pruned_one_and_no_more(policy: PruningPolicy) -> None:
    model = llava("tiny", 144, CPU, torch.float32)
    runs = Runs(model, prompt(model, 144, 2))
    read = runs.layers(policy)
    floor = Floor(runs.family, runs.timer, (read.amax(0) + runs.text).tolist(), runs.batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:  # products that the counter sees
        floor()
    sizes = Prompts.of(torch.full((2,), runs.text), torch.full((2,), runs.tokens))
    assert counted.get_total_flops() == Prices.of(runs.family).price("prefill_flops", sizes, read).sum()
    assert runs.bound(read) < 0.7


def test_a_ratio_is_the_median_of_pairs() -> None:
    middle, low, high = ratio([2.0, 3.0, 40.0], [1.0, 1.0, 10.0])
    assert middle == 3.0 and 2.0 <= low <= middle <= high <= 4.0


def test_the_benchmark_writes_rows_and_the_machine(tmp_path: Path) -> None:
    main(["--quick", "--methods", "stride", "fastv", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "floor.json").read_text())
    assert [(row["method"], row["keep"]) for row in found["rows"]] == [
        *(("stride", 0.25), ("fastv", 0.25)),
        *(("stride", 0.1), ("fastv", 0.1)),
    ]
    assert all(row["choosing_share"][0] > 0 and row["floor_s"] > 0 for row in found["rows"])
    assert found["machine"]["torch"] == torch.__version__ and "| fastv |" in (tmp_path / "floor.md").read_text()
