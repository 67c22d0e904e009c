"""Completion of `catp`: the scripts that it prints, in real shells, where these are installed."""

import re
import shutil
from collections.abc import Callable
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from catp_lightning.cli.main import SUMMARIES, main
from catp_lightning.data import SHIPPED
from catp_lightning.methods.scorers import SCORERS
from tests.support.commands import CONFIGS, fails
from tests.support.quick import quick
from tests.support.shells import SHELLS

Shell = Callable[[tuple[str, ...], Path], list[str]]


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """What a shell offers for the last of some words, in a folder."""
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} is installed: apt-get install {request.param}")
    script = printed(request.param, tmp_path_factory.mktemp("script"))
    return lambda words, folder: SHELLS[request.param](script, words, folder)


def printed(shell: str, folder: Path) -> Path:
    """File with what `catp completion` prints for a shell."""
    (folder / "catp").write_text(text(shell))
    return folder / "catp"


@cache
def text(shell: str) -> str:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stdout", written := StringIO())
        main(["completion", shell])
    return written.getvalue()


@pytest.mark.parametrize("shell", quick(SHELLS, {"bash", "fish"}), indirect=True)  # zsh takes longest
def test_shells_complete_commands_and_the_options_and_names_that_each_takes(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    for words, expected in {
        ("",): list(SUMMARIES),
        ("ca",): ["calibrate"],
        ("calibrate", "--max"): ["--max_disagreement"],
        ("validate", "--max"): [],  # only a calibration has it
        ("test", "--trainer.precision", "bf16-m"): ["bf16-mixed"],
        ("test", "--config", "digits_"): [name for name in CONFIGS if name.startswith("digits_")],
        ("test", "--config", "m"): ["mine.yaml"],
        ("demo", "--config", ""): ["mine.yaml"],  # takes no shipped one: those are of models and data
        ("test", "--policy", "mi"): ["mine.yaml"],
        ("test", "--keep", "0.5", "--scorer", ""): sorted(SCORERS),
        ("sweep", "--scorers", "cal"): ["calibrated"],
        ("sweep", "--models", ""): list(SHIPPED),
        ("calibrate", "--over", ""): ["images", "questions"],
        ("predict", "--compare", ""): ["true", "false"],
        ("test", "--model.pro"): ["--model.processor"],
        ("test", "--data.ba"): ["--data.batch_size"],
        ("recipe", ""): ["list", "show", "run"],
        ("recipe", "show", "digits-b"): ["digits-blip2"],
        ("recipe", "run", "digits-blip2", "--dr"): ["--dry-run"],
        ("recipe", "run", "digits-blip2", "--calibration_d"): ["--calibration_draws"],  # of a sweep
        ("recipe", "show", "digits-blip2", "--calibration_d"): [],
        ("league", "--run", "digits-b"): ["digits-blip2"],
        ("league", "--sc"): ["--scorers"],
        ("completion", ""): ["bash", "zsh", "fish"],
    }.items():
        assert sorted(shell(words, tmp_path)) == sorted(expected), words


@pytest.mark.parametrize("command", ["calibrate", "sweep", "scenes"])
def test_every_option_that_help_explains_is_completed(
    shell: Shell, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    explained = set(re.findall(r"^  (?:-\w(?: \w+)?, )?(--[\w.]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--help", "--config", "--output"} <= explained
    assert explained <= set(shell((command, "--"), tmp_path))


@pytest.mark.parametrize("name", SHELLS)
def test_scripts_have_every_command_and_configuration(name: str) -> None:
    assert all(word in text(name) for word in (*SUMMARIES, *CONFIGS, "--max_disagreement"))


def test_a_shell_without_completion_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, message = fails(capsys, "completion", "tcsh")
    assert code == 2
    assert all(part in message for part in ("tcsh", "bash", "zsh", "fish"))
