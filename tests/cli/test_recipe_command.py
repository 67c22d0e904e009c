"""`catp recipe`: every recipe runs with a small model of its class, on small files in the layout of its data sets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from catp_lightning.cli.main import main
from catp_lightning.data import shipped
from catp_lightning.evaluation.recipes import names, read
from tests.support.commands import fails
from tests.support.recipe_files import write_data
from tests.support.recipe_models import small_model

SMALL = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.num_workers", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(name: str, data: Path, model: str, *more: str) -> None:
    main(["recipe", "run", name, "--data", str(data), "--model", model, "--output", "out", *more, *SMALL])


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_recipe_runs_with_a_small_model_of_its_class(name: str, data: Path, tmp_path: Path) -> None:
    found = read(name)
    own = next(scorer for scorer in (*found.scorers, "l2-norm") if scorer not in ("calibrated", "all"))
    run(name, data, small_model(name, tmp_path / "model"), "--scorers", f"[{own}, stride]", "--keep", "4")
    for task in found.tasks:
        (table,) = Path("out", task.name).glob("*/table.json")
        rows = {row["method"]: row for row in json.loads(table.read_text())["rows"]}
        assert {"no pruning", own, "stride"} <= rows.keys()
        assert all(0 <= row["accuracy"] <= 1 for row in rows.values()), "every data set has a rule"


@pytest.mark.slow
def test_a_task_runs_and_its_figures_stand_beside_the_published_ones(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, model = "fastervlm-llava-1.5-7b", str(shipped("digits_llava"))
    run(name, data, model, "--task", "pope-random", "--scorers", "[fastervlm]", "--keep", "[58, 29]")
    assert "yours" in capsys.readouterr().out
    text = Path("out/pope-random/digits_llava/table.md").read_text()
    assert "| accuracy (95%) | % of unpruned | pope_f1 | agreement (95%)" in text
    main(["recipe", "show", name, "--output", "out"])
    shown = capsys.readouterr().out.splitlines()
    (line,) = (line for line in shown if line.startswith("mean of ten tasks") and " 58 " in line)
    assert line.split()[-5:-2] == ["unpruned", "94.24", "100.00"] or "94.24" in line
    assert any(line.startswith("gqa: not run: catp recipe run") for line in shown)


def test_a_dry_run_says_what_is_read_and_loads_nothing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in names():
        main(["recipe", "run", name, "--data", str(data), "--dry-run", "--keep", "[4, 2]"])
        told = capsys.readouterr().out
        assert "of weights" in told and "in all  about" in told and "MISSING" not in told
        assert all(f"task    {task.name}:" in told for task in read(name).tasks)
    main(["recipe", "run", "internvl3-8b", "--task", "[mme, mmbench]", "--dry-run", "--scorers", "stride"])
    told = capsys.readouterr().out
    assert "MISSING data/mme/MME_Benchmark_release_version" in told and "textvqa:" not in told
    assert "4,329 questions, at most 4 jobs" in told
    main(["recipe", "run", "catp-blip2-opt-2.7b", "--dry-run", "--data.fraction", "0.2"])
    assert "42,870 questions" in capsys.readouterr().out, "the recipe's own are a tenth"
    assert not Path("runs").exists()


def test_what_is_wrong_is_told_before_anything_runs(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, told in (
        (["show", "digits"], "There is no recipe 'digits'"),
        (["show", "digits-blip2", "--keep", "4"], "unrecognized arguments: --keep 4"),
        (["run", "digits-blip2", "--task", "gqa"], "digits-blip2 has no task 'gqa'; it has digits"),
        (["run", "digits-blip2"], "6 files or folders that are not there: data/digits_blip2/calibration"),
        (["run", "digits-blip2", "--data", str(data), "--output", "new", "--scorers", "catq"], "no scorer 'catq'"),
        (["walk"], "invalid choice: 'walk'"),
    ):
        if "new" in args:
            Path("new/digits").mkdir(parents=True)
            with pytest.raises(SystemExit) as stopped:
                main(["recipe", *args])
            assert stopped.value.code == 2 and told in capsys.readouterr().err
            continue
        status, message = fails(capsys, "recipe", *args)
        assert status == 2 and told in message


def test_the_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipe", "list"])
    told = capsys.readouterr().out
    assert all(name in told for name in names())


@pytest.mark.slow  # a process that imports torch
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m catp_lightning recipe list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rror" not in done.stderr, done.stderr
