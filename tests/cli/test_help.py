"""Help, versions and misspelt commands."""

import re
import subprocess
import sys

import pytest

from catp_lightning.cli.main import SUMMARIES, main
from tests.support.commands import CONFIGS


@pytest.mark.parametrize(
    ("command", "options"),
    {
        "calibrate": "--config --keep --max_disagreement --confidence --over --group_by --output --model "
        "--trainer.devices --ckpt_path",
        "validate": "--config --policy --scorer --scorer_args --selector --keep --compare --model --trainer.precision",
        "test": "--config --policy --keep --compare --data --ckpt_path",
        "predict": "--config --policy --keep --compare --output",
        "profile": "--config --policy --scorer --keep --model",
        "show": "--config --policy --scorer --keep --output --model",
        "recipe": "",
        "league": "--run --folder --output --check --task --model --data --machine",
        "scenes": "--output --questions --calibration_questions --seed --model --shift",
        "demo": "--output --questions --calibration_questions --seed",
    }.items(),
)
def test_help_of_a_command_says_what_it_does_and_names_its_options(capsys, command, options):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert SUMMARIES[command] in " ".join(text.split())
    missing = [option for option in options.split() if f" {option} " not in text]
    assert not missing
    assert "max_epochs" not in text  # of training


def test_help_names_every_command_and_shipped_configuration(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"\n  {command} " in text and f"catp {command}" in text for command in SUMMARIES)
    assert CONFIGS
    assert all(name in text for name in CONFIGS)


def test_help_versions_and_misspelt_commands_import_nothing_that_takes_long():
    code = """
import sys
from catp_lightning.cli.main import main
for args in ([], ["--version"], ["calibrat"], ["demo", "--help"], ["scenes", "--qestions", "4"]):
    before = {"torch", "lightning", "transformers", "sklearn", "numpy"} & sys.modules.keys()
    try:
        main(args)
    except SystemExit as error:
        status = error.code
    print("ended", status, before, "jsonargparse" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=900)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    light = ["ended 0 set() False", "ended 0 set() False", "ended 2 set() False"]
    assert ended == [*light, "ended 0 set() True", "ended 2 set() True"]


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert re.match(r"catp-lightning \S+", capsys.readouterr().out)
