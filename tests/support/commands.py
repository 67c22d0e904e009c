"""Commands of `catp` in this process and in one of their own, and what they print and write."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from catp_lightning.cli.main import main
from tests.support.paths import ROOT
from tests.support.processes import environment

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
QUESTIONS = 10
BLIP2 = {"type": "blip-2", "visual_tokens": 32, "cross_attention_layers": 6, "heads": 12}


def split(folder: Path) -> dict[str, str]:
    names = {"questions": "questions.json", "annotations": "annotations.json", "images": "images"}
    return {key: str(folder / name) for key, name in names.items()} | {"image_name": "{image_id:012d}.png"}


def catp(made: Path, command: str, *args: object) -> None:
    main([command, "--config", str(made / "tiny.yaml"), *map(str, args)])


def printed(output: str) -> dict[str, float]:
    """The table that Lightning prints."""
    return {name: float(value) for name, value in re.findall(r"((?:catp|val|test)/\w+)\W+([\d.]+)", output)}


def answers(path: str | Path) -> dict[int, str]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    found = {line["question_id"]: line["answer"] for line in lines}
    assert len(found) == len(lines)  # no question twice
    return found


def asked(made: Path, name: str = "test") -> list[int]:
    questions = json.loads((made / name / "questions.json").read_text())["questions"]
    return [question["question_id"] for question in questions]


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Exit status and message of a command that must fail; it must leave every file as it was."""
    before = everything(Path.cwd())
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    after = everything(Path.cwd())
    assert {file: content for file, content in after.items() if "rank0" not in file.name} == before  # answers are kept
    output, errors = capsys.readouterr()
    assert "Traceback" not in output + errors
    _, *messages = errors.split("catp: error: ")
    assert len(messages) == 1
    return stopped.value.code, messages[0]


def process(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from catp_lightning.cli.main import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment())
