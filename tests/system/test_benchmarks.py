"""The benchmarks' own arithmetic, by hand, and that replaying answers is predicting them."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.agreement import replayed
from benchmarks.agreement_spread import paired_interval, spread
from benchmarks.agreement_verdicts import BEST, BUDGETS, met, verdicts
from benchmarks.answers import predict, scenes_split
from benchmarks.scaling import table
from catp_lightning import PruningPolicy, VQAModule
from catp_lightning.data import shipped
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.figure import figure
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.utils.messages import quiet

PLAIN = "diversity of outputs (plain DPP)"


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py")), ids=lambda file: file.stem
)
def test_every_benchmark_can_be_imported(file: Path) -> None:
    import_module(f"benchmarks.{file.stem}")


@pytest.mark.parametrize(
    ("method", "keep", "low", "agreement", "enough"),
    [
        ("CATP, all layers", 0.5, 0.001, 0.6, True),
        ("CATP, all layers", 0.5, 0.0, 0.6, False),
        ("L2 norm", 0.5, -0.004, 0.989, False),
        ("L2 norm", 0.5, -0.004, 0.99, True),
        (PLAIN, 0.25, -0.005, 0.9, True),
        (PLAIN, 0.25, -0.0051, 0.9, False),
        (PLAIN, 0.125, 0.0, 0.9, False),
        (PLAIN, 0.0625, 0.001, 0.9, True),
        ("random (3 seeds)", 0.125, -0.001, 0.995, False),
    ],
)
def test_a_rival_is_beaten_by_the_lower_end_and_a_control_never_excused(
    method: str, keep: float, low: float, agreement: float, enough: bool
) -> None:
    row = {"method": method, "keep": keep, "agreement": agreement, "reference_ahead_interval": [low, 1.0]}
    assert met(row) is enough


def comparison() -> Comparison:
    """40 questions about 20 images: calibration is right on all at 1/2, on three in four below; rivals on half."""
    right = {keep: np.tile([1, 1, 1, 1 if keep == 0.5 else 0], 10).astype(float) for keep in BUDGETS}
    rivals = ["CATP, all layers", BEST, "self-attention", "L2 norm", "random (3 seeds)", PLAIN]
    rivals += ["diversity of cross-attention (plain DPP)", "stride"]
    results = [Result(name, keep, None, np.tile([1.0, 0.0], 20), 32 * keep) for name in rivals for keep in BUDGETS]
    ours = [Result(CALIBRATED, keep, None, right[keep], 32 * keep) for keep in BUDGETS]
    return Comparison([number // 2 for number in range(40)], CALIBRATED, results + ours)


def test_the_verdicts_say_what_was_aimed_at_and_what_was_reached() -> None:
    aims, rivals = verdicts(comparison().rows()).split("Is *calibrated* ahead?")
    assert "| 0.5 | 0.995 | 1.0000 (1.0000 to 1.0000) | yes |" in aims
    assert "| 0.25 | 0.985 | 0.7500 " in aims and aims.count("**no**") == 3
    lines = [line.split(" | ") for line in rivals.splitlines() if "(+" in line]
    assert [line[1] for line in lines] == ["ahead"] * 4 + ["not worse"] * 3 + ["-"]
    assert all(line[2] == "yes (+0.500)" for line in lines)


def test_a_rival_that_is_level_is_a_bold_no() -> None:
    found = comparison()
    level = [replace(one, method="position") for one in found.results if one.method == CALIBRATED]
    text = verdicts(Comparison(found.images, CALIBRATED, [*found.results, *level]).rows())
    assert "| position | - | yes (+0.000) | **no** (+0.000) | **no** (+0.000) | **no** (+0.000) |" in text


def test_a_table_without_accuracy_shows_agreement_alone() -> None:
    found = comparison()
    full = Result("no pruning", None, None, np.ones(40), 32.0)
    table = ModelTable.of("m", "", Comparison(found.images, CALIBRATED, [full, *found.results]), {}, {})
    assert "accuracy" not in table.markdown() and "accuracy" not in table.rows[0]
    assert "| **calibrated** | 1.000 (1.000 to 1.000) | 16.0 |" in table.markdown()
    (axes,) = figure([table]).axes
    assert axes.get_ylabel() == "agreement with the unpruned model"


def test_the_spread_is_over_draws_and_sizes_are_paired_by_draw() -> None:
    agreement = np.full((3, 3, len(BUDGETS)), 0.9)
    agreement[:, 1, 0] = [0.80, 0.84, 0.88]  # 256 questions
    agreement[:, 2, 0] = [0.82, 0.86, 0.90]  # 512: 0.02 more in every draw
    text = spread(agreement)
    assert "| 256 | 0.840, 0.040 (0.800 to 0.880) | 0.900, 0.000 (0.900 to 0.900)" in text
    assert "| 512 - 256 | +0.0200 (+0.0200 to +0.0200) | +0.0000" in text
    assert "| mean | **no** | yes | yes | yes |" in text


def test_the_paired_interval_is_students() -> None:
    low, high = paired_interval(np.array([[1.0], [2.0], [6.0]]))
    half = 4.302653 * (7 / 3) ** 0.5  # t(0.975, 2) times the standard error: variance 7 of three
    assert (low[0], high[0]) == pytest.approx((3 - half, 3 + half))


@pytest.mark.slow
def test_what_more_processes_do_is_predicted_from_one_and_two() -> None:
    def run(processes: int, samples: int, cpu: float, received: int) -> dict[str, Any]:
        return {
            "processes": processes,
            "samples": samples,
            "cpu_seconds": cpu,
            "bytes": received,
            "all_gather": 7,
            "barrier": 2,
        }

    # 10 s + 0.5 s for each of its samples; 1 MB from each process and 20 kB for each sample of all
    alone = [run(1, 100, 60.0, 0), run(1, 50, 35.0, 0)]
    text = table([*alone, run(2, 100, 35.0, 4_000_000), run(2, 50, 22.5, 3_000_000), run(3, 100, 54.0, 6_000_000)])
    assert "10.00 + 0.5000" in text and "1,000,000 from each process + 20,000 for each sample" in text
    last = [cell.strip() for cell in text.strip().splitlines()[-1].strip("|").split("|")]
    assert last == ["3", "100", "54.0", "27.0", "2.00", "6.00", "5.00", "9"]


def test_replayed_answers_are_those_of_predict(tmp_path: Path) -> None:
    model = str(shipped("digits_blip2"))
    data = VQADataModule(model, test=scenes_split(tmp_path, "test", 32, 3), batch_size=16)
    module, batches = VQAModule(model), list[Any](data.test_dataloader())
    diverse = {"selector": "dpp", "selector_args": {"relevance": -0.5}}
    policies = [PruningPolicy("catp", keep=0.25), PruningPolicy("catp", keep=3, **diverse)]
    found = replayed(module, batches, policies)
    assert found.images == [int(image) for batch in batches for image in batch["image_ids"]]
    with quiet(ours=False):
        assert found.answers == predict(module, batches, None)
        for policy, same in zip(policies, found.same, strict=True):
            assert 3 < same.sum() < 32, "some answers must change, or this proves nothing"
            assert list(same) == list(np.equal(predict(module, batches, policy), found.answers))
