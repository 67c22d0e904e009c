"""`catp league`: from the commands of the page to a row, with a small model and small files."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from catp_lightning.cli.main import main
from catp_lightning.data import shipped
from catp_lightning.evaluation.league import read_all
from tests.support.commands import fails
from tests.support.paths import ROOT
from tests.support.recipe_files import write_data

SMALL = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.num_workers", "0"]


def commands() -> list[list[str]]:
    """The commands that the page names, in their order."""
    part = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").split("## A row of the league")[1]
    block = re.findall(r"```console\n(.*?)```", part, flags=re.DOTALL)[0]
    return [shlex.split(line) for line in block.splitlines()]


def test_the_commands_of_the_page_lead_to_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = commands()
    assert len(found) == 5 and found[0] == ["pip", "install", "catp-lightning"]
    write_data(Path("data"))
    for program, *args in found[1:]:
        assert program == "catp"
        if args[:2] == ["league", "--run"]:  # a small model of the same class, and two methods
            args += ["--model", str(shipped("digits_llava")), "--scorers", "[fastervlm, stride]", *SMALL]
        main(args)
    told = capsys.readouterr().out
    assert "there   data/gqa/images" in told and "MISSING" not in told
    (submission,) = read_all(Path("league"))
    assert (submission.model, submission.data, submission.recipe) == ("digits_llava", "gqa", "fastervlm-llava-1.5-7b")
    assert [row.method for row in submission.rows] == ["no pruning", "fastervlm", "stride"]
    fastervlm = submission.rows[1]
    assert fastervlm.keep == 64 and fastervlm.tokens == 64 and (fastervlm.seconds or 0) > 0
    assert 0 < (fastervlm.prefill_flops or 0) < 1 and fastervlm.accuracy_change_interval is not None
    page = Path("docs/league.md").read_text()
    assert "## digits_llava, gqa" in page and "| fastervlm | " in page
    assert json.loads(Path("league/league.json").read_text())["submissions"][0]["data"] == "gqa"


@pytest.mark.slow
def test_policies_of_calibrated_methods_lie_beside_their_submission() -> None:
    main(["scenes", "--output", "data/digits_blip2", "--questions", "12", "--calibration_questions", "64"])
    options = ["--scorers", "[calibrated fastv, stride]", "--keep", "0.25", "--calibration_draws", "2"]
    main(["league", "--run", "digits-blip2", *options, "--trainer.accelerator", "cpu"])
    (submission,) = read_all(Path("league"))
    (calibrated,) = (row for row in submission.rows if row.method == "calibrated fastv")
    assert calibrated.policies == ("calibrated-fastv/keep-0.25.json", "calibrated-fastv-draw-2/keep-0.25.json")
    shutil.rmtree("runs")
    main(["league"])
    main(["league", "--check", "true"])


def test_what_is_wrong_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for args, told in (
        (["--run", "digits-blip3"], "There is no recipe 'digits-blip3'"),
        (["--run", "digits-blip2"], "files or folders that are not there: data/digits_blip2/calibration"),
        (["--run", "digits-blip2", "--task", "gqa"], "digits-blip2 has no task 'gqa'"),
        (["--keep", "4"], "--keep 4 needs --run, which names the recipes to run"),
        (["--machine", "mine"], "--machine needs --run"),
        (["--check", "maybe"], "invalid choice: 'maybe'"),
        ([], "There is no folder league, in which submissions are"),
    ):
        status, message = fails(capsys, "league", *args)
        assert status in (1, 2) and told in message
