"""Completion of `catp` in a shell: the script that it prints, in a real bash."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from catp_lightning.cli.main import SUMMARIES, main
from catp_lightning.data import SHIPPED
from catp_lightning.methods.scorers import SCORERS
from tests.support.commands import CONFIGS, fails

BASH = shutil.which("bash")
WITHOUT = {"zsh": ("-n",), "fish": ("--no-execute",)}
"""Options by which a shell reads a script and runs nothing of it."""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if BASH is None:
        pytest.skip("no bash is installed")
    return printed("bash", tmp_path_factory.mktemp("script"))


def printed(shell: str, folder: Path) -> Path:
    """File with what `catp completion` prints for a shell."""
    with pytest.MonkeyPatch.context() as patched, (folder / "catp").open("w") as file:
        patched.setattr("sys.stdout", file)
        main(["completion", shell])
    return folder / "catp"


def completed(script: Path, *words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers for the last word of a command line."""
    asked = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _shtab_catp; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        [str(BASH), "--norc", "-c", asked, str(script), "catp", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=cwd,
    )
    assert not done.stderr
    return done.stdout.split()


def test_bash_completes_commands_and_the_options_and_names_that_each_takes(script: Path, tmp_path: Path) -> None:
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
        assert completed(script, *words, cwd=tmp_path) == expected, words


@pytest.mark.parametrize("command", ["calibrate", "sweep", "scenes"])
def test_every_option_that_help_explains_is_completed(
    script: Path, capsys: pytest.CaptureFixture[str], command
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    explained = set(re.findall(r"^  (?:-\w(?: \w+)?, )?(--[\w.]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--help", "--config", "--output"} <= explained
    assert explained <= set(completed(script, command, "--"))


@pytest.mark.parametrize("shell", WITHOUT)
def test_other_shells_can_read_their_scripts(tmp_path: Path, shell: str) -> None:
    script = printed(shell, tmp_path)
    assert all(name in script.read_text() for name in (*SUMMARIES, *CONFIGS, "--max_disagreement"))
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"no {shell} is installed, which would read the script")
    subprocess.run([program, *WITHOUT[shell], str(script)], check=True, timeout=60)


def test_a_shell_without_completion_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, message = fails(capsys, "completion", "tcsh")
    assert code == 2
    assert all(part in message for part in ("tcsh", "bash", "zsh", "fish"))
