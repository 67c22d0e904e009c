"""Sweeps of the shipped models on a few questions."""

import json
from pathlib import Path
from typing import Any

from catp_lightning.cli.main import main

QUESTIONS = 24
METHODS = ["fastv", "fastervlm", "self-attention", "random", "stride"]
ARGS = ["--models", "digits_blip2", "--scorers", ",".join(METHODS), "--keep", "0.5,2", "--seed", "1"]
JOBS = (1 + 1 + 3 + 1) * 2  # fastervlm makes no sense there, random has three seeds


def sweep(output: Path, *args: object) -> Path:
    counts = ["--questions", QUESTIONS, "--calibration_questions", 8, "--output", output]
    main(["sweep", *map(str, [*counts, "--trainer.accelerator", "cpu", *args])])
    return output


def jobs(output: Path, model: str = "digits_blip2") -> dict[str, int]:
    """When each job's file was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output / model / "jobs").glob("*.json")}


def table(output: Path, model: str = "digits_blip2") -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((output / model / "table.json").read_text())["rows"]
    return {(row["method"], repr(row["keep"])): row for row in rows}


def outcome(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / "digits_blip2/jobs" / name).read_text())["outcome"]
