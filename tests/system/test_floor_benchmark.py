"""The benchmark: what a floor run does, by torch's counter of FLOPs, parts of a call, memory, growth, and a run."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench.__main__ import main
from benchmarks.bench.families import MODELS, build
from benchmarks.bench.families import prompt as family_prompt
from benchmarks.bench.floor import PLAIN, Floor, Runs, ratio
from benchmarks.bench.growth import exponent, figure
from benchmarks.bench.page import MIB
from benchmarks.bench.shapes import llava, prompt
from benchmarks.bench.stages import EAGER, STEPS, Held, call, largest_batch, stages
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
    main(["floor", "--quick", "--methods", "stride", "fastv", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["method"], row["keep"]) for row in found["floor"]] == [
        *(("stride", 0.25), ("fastv", 0.25)),
        *(("stride", 0.1), ("fastv", 0.1)),
    ]
    assert all(row["choosing_share"][0] > 0 and row["floor_s"] > 0 for row in found["floor"])
    assert found["machine"]["torch"] == torch.__version__ and "| fastv |" in (tmp_path / "bench.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_grad")
def test_parts_of_a_call_and_its_cache() -> None:
    model = llava("tiny", 144, CPU, torch.float32)
    runs = Runs(model, prompt(model, 144, 2))
    rows = {row["case"]: row for row in stages(runs, {"l2-norm": PruningPolicy("l2-norm", keep=0.25)}, 1)}
    assert set(rows) == {PLAIN, EAGER, "keep 1.0", "l2-norm"}
    rows_kept = {PLAIN: 144, EAGER: 144, "keep 1.0": 144, "l2-norm": 36}
    for name, kept in rows_kept.items():  # keys and values of 4 layers 64 wide, float32, of 2 samples
        assert rows[name]["cache_bytes"] == 2 * 4 * 64 * 4 * 2 * (kept + runs.text + STEPS)
        assert all(rows[name]["seconds"][part] > 0 for part in ("vision", "reading", "step", "call"))
    assert model.config._attn_implementation == "sdpa"  # as before the eager call


@pytest.mark.slow
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(("name", "kept"), list(zip(MODELS, (36 // 4, 32 // 4, 4 * 17 // 4), strict=True)))
def test_models_of_other_families_answer_pruned(name: str, kept: int) -> None:
    model = build(name, tiny=True, device=CPU, dtype=torch.float32)
    runs = Runs(model, family_prompt(model, 2, 12))
    for method in MODELS[name][-1]:
        left = runs.layers(PruningPolicy(method, keep=0.25))[:, -1].tolist()
        union = method == "trimmed-llama"  # of the rows that each head would keep
        assert all(kept < count < 4 * kept for count in left) if union else left == [kept, kept]
    plain, pruned = call(runs, None), call(runs, PruningPolicy("l2-norm", keep=0.25))
    assert pruned.cache < plain.cache and plain.parts.steps == STEPS


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak of a part of a run")
def test_the_peak_is_that_of_the_part_alone() -> None:
    first = Held(CPU)
    torch.ones(64 * MIB, dtype=torch.uint8, device="cpu")
    assert 60 * MIB <= first.peak() <= 80 * MIB
    assert Held(CPU).peak() < 4 * MIB


def test_the_largest_batch_is_found_by_running_out_of_memory() -> None:
    def answer(samples: int) -> None:
        if samples > 37:
            raise torch.OutOfMemoryError

    assert largest_batch(answer) == 32
    assert largest_batch(lambda samples: None, most=8) == 8

    def never(samples: int) -> None:
        raise torch.OutOfMemoryError

    assert largest_batch(never) == 0


def test_the_exponent_of_squares_is_two(tmp_path: Path) -> None:
    points = [(size, 1e-6 * size**2) for size in (144, 576, 2880)]
    assert exponent(points) == pytest.approx(2)
    drawn = figure({"dpp": points}, {"text": {PLAIN: points}})
    assert [axes.get_xscale() for axes in drawn.axes[:2]] == ["log", "log"]
    assert {"dpp, 2.0", "order 2"} <= {text.get_text() for text in drawn.axes[0].texts}
