"""The benchmark of kernels beside loops: a run of the whole, by Triton's interpreter where Triton is installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.launches import NAMES, compared, main
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors import Selector, fused

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_benchmark_compares_choices_and_writes_rows(tmp_path: Path) -> None:
    main(["--tokens", "9", "--batch", "2", "--features", "4", "--repeats", "1", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "launches.json").read_text())
    assert [row["selector"] for row in found["rows"]] == list(NAMES) and found["machine"]["device"] == "cpu"
    assert all(row["same"] and row["kernels_launches"] is None and row["loops_ms"] > 0 for row in found["rows"])
    assert any(row["warnings"] for row in found["rows"]) == (find_spec("triton") is None)
    assert "| recycle | 9 | 2 | 0.25 | not counted |" in (tmp_path / "launches.md").read_text()


class ByWay(Selector):
    """Keeps all tokens where kernels choose, and none where loops do."""

    def select(self, scores: Tensor, visual: Tensor, counts: Tensor, vectors: Tensor | None) -> Selection:
        return Selection(torch.full_like(visual, fused.for_kernels(scores)))


def test_another_choice_of_the_loops_is_seen() -> None:
    given = (torch.rand(1, 5), torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]), torch.rand(1, 5, 3))
    assert not compared(ByWay(), given, CPU, 1)["same"]
