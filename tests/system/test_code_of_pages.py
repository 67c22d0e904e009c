"""Python on the pages: it runs, or, where it needs a large model or data, is Python and imports what exists."""

import ast
import re
from pathlib import Path

import pytest

from catp_lightning import VQAModule
from catp_lightning.data import GRIDS, PROMPTS, shipped
from catp_lightning.data.scenes import write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_python_and_imports_what_exists(page: Path) -> None:
    for block in blocks(page):
        for node in ast.parse(block).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


def test_the_blocks_on_budgets_run_in_their_order() -> None:
    found, names = blocks(ROOT / "docs/budget.md"), dict[str, object]()
    for block in found:
        exec(compile(block, "docs/budget.md", "exec"), names)
    assert len(found) >= 4


@pytest.mark.slow
def test_the_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    splits = {}
    for name in ("calibration", "test"):
        splits[name] = VQASplit.of_scenes(write_scenes(tmp_path / name, name, 48, grids=GRIDS["digits_llava"]))
    model = str(shipped("digits_llava"))
    data = VQADataModule(model, **splits, prompt=PROMPTS["digits_llava"], batch_size=16)
    data.setup()
    names = {"module": VQAModule(model), "loader": data.test_dataloader()}
    (block,) = blocks(ROOT / "README.md")
    exec(compile(block, "README.md", "exec"), {**names, "calibration_loader": data.calibration_dataloader()})
    assert (tmp_path / "policy.json").is_file()
