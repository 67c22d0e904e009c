"""Write the golden files: policies that calibrations of the shipped models write, and the table of the demo.

    python -m tests.support.golden_policies

A change that is meant to alter no policy leaves every file as it is, byte for byte; one that alters some writes them
anew and says in its commit what changed and why.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch

from catp_lightning import CrossAttentionCalibration, VQAModule
from catp_lightning.cli.main import main as catp
from catp_lightning.data import GRIDS, PROMPTS, shipped
from catp_lightning.data.scenes import write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.utils.files import write_text
from tests.support.paths import ROOT

FOLDER = ROOT / "tests/golden"
DEMO = FOLDER / "demo.md"
IMAGES, QUESTIONS = 64, 2  # and questions about each
BUDGETS = (0.25, 0.125)
PROMISE = 0.25  # of the answers may change
NAMED = {"digits_blip2": "catp", "digits_llava": "fastv", "digits_mllama": "trimmed-llama"}
MACHINE = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
"""Of another version or kind of CPU sums differ in their last digits."""


@dataclass(frozen=True)
class Case:
    """One calibration."""

    model: str
    seed: int
    scorer: str | None  # None: all methods compete
    promise: bool

    @property
    def file(self) -> Path:
        """Where its policies are kept."""
        kind = "promise" if self.promise else "budgets"
        return FOLDER / f"{self.model}-{self.scorer or 'all'}-{kind}-{self.seed}.json"


def cases() -> Iterator[Case]:
    """Every case, by model."""
    for model, seed, named, promise in product(NAMED, (0, 1), (False, True), (False, True)):
        yield Case(model, seed, NAMED[model] if named else None, promise)


def calibrated(case: Case, module: VQAModule, folder: Path) -> str:
    """The policies that a calibration writes, as a JSON list; `folder` takes its data and files."""
    place = write_scenes(folder / "scenes", "calibration", IMAGES * QUESTIONS, case.seed, QUESTIONS, GRIDS[case.model])
    split = VQASplit.of_scenes(place)
    data = VQADataModule(str(shipped(case.model)), calibration=split, batch_size=40, prompt=PROMPTS[case.model])
    budgets: dict[str, Any] = {"max_disagreement": PROMISE} if case.promise else {"keep": list(BUDGETS)}
    callback = CrossAttentionCalibration(folder / "policies", scorer=case.scorer, **budgets)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, callbacks=[callback], **quiet)
    trainer.predict(module, data.calibration_dataloader(), return_predictions=False)
    return json.dumps([policy.to_dict() for policy in callback.policies], indent=1, sort_keys=True) + "\n"


def demo_table(folder: Path) -> str:
    """The table that the demo writes into `folder`."""
    catp(["demo", "--output", str(folder)])
    return (folder / "digits_blip2" / "table.md").read_text()


def main() -> None:
    """Write every file anew."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        write_text(DEMO, demo_table(Path(folder)))
    write_text(FOLDER / "machine.json", json.dumps(MACHINE, indent=1) + "\n")
    modules = {model: VQAModule(str(shipped(model))) for model in NAMED}
    for case in cases():
        with TemporaryDirectory() as folder:
            write_text(case.file, calibrated(case, modules[case.model], Path(folder)))
        print(case.file.name, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
