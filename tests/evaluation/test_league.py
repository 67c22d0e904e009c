"""The league: its page is what the folders of submissions say, and what is wrong in one is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catp_lightning.cli.main import main
from catp_lightning.errors import DataError
from catp_lightning.evaluation.league import league_json, league_page, read, read_all
from catp_lightning.evaluation.recipes import names
from catp_lightning.evaluation.recipes import read as read_recipe
from tests.support.paths import ROOT
from tests.support.submissions import submitted


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    file = folder / "submission.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_page_of_the_league_is_what_its_folders_say(capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = str(ROOT / "league"), str(ROOT / "docs/league.md")
    main(["league", "--check", "true", "--folder", folder, "--output", page])
    assert len(read_all(ROOT / "league")) >= 1


def test_a_submission_comes_back_as_it_was_written(tmp_path: Path) -> None:
    place = submitted(tmp_path / "league", tmp_path / "results")
    assert place == tmp_path / "league/digits_blip2/digits"
    found = read(place)
    assert [(row.method, row.keep) for row in found.rows] == [
        ("no pruning", None), ("calibrated", 0.5), ("calibrated", 0.25), ("stride", 0.25)
    ]  # fmt: skip
    full, half, quarter, stride = found.rows
    assert quarter.policies == ("calibrated/keep-0.25.json", "calibrated-draw-2/keep-0.25.json")
    assert half.policies == ("calibrated/keep-0.5.json",) and stride.policies == ()
    assert full.accuracy == 0.75 and full.accuracy_change is None and full.prefill_flops == 1.0
    assert quarter.accuracy_share == 0.5 and quarter.accuracy_change == -0.375 and quarter.tokens_per_layer == 20
    assert stride.tokens_per_layer == stride.tokens == 8 and stride.figures[0].name == "pope_f1" and stride.control
    assert found.notes == ("fastervlm: There is no [CLS] token.",) and found.date == "2026-01-31"
    assert read_all(tmp_path / "league") == [found]


def row(number: int, **values: Any) -> Callable[[Any], None]:
    return lambda content: content["rows"][number].update(values)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (row(1, accuracy=1.2), r"row 2: accuracy is 1.2; allowed is a number from 0 to 1"),
        (row(1, tokens="8"), r"tokens of row 2 is '8'; allowed is a finite number"),
        (row(2, tokens=-1), r"row 3: tokens is -1.0; allowed is a number at least 0"),
        (
            row(1, accuracy_interval=[0.5, 0.25]),
            r"row 2: accuracy_interval is \[0.5, 0.25\]; allowed are two",
        ),
        (row(1, policies=["../../secret.json"]), r"row 2: policies has '../../secret.json'; allowed is <method>/keep-"),
        (row(1, keep=0), r"row 2: keep is 0; keep is a share"),
        (row(1, score=1), r"row 2 has no argument 'score'; it takes accuracy, "),
        (row(2, keep=None), r"rows \[1, 3\] have keep null; allowed is the first row alone"),
        (row(2, keep=0.5), r"rows have 'calibrated' at keep 0.5 twice"),
        (row(3, control="yes"), r"control of row 4 is 'yes'; allowed is true or false"),
        (row(3, figures=[{"name": 3, "value": 1}]), r"name of figures of row 4 is 3; allowed is text"),
        (lambda content: content.update(rows=[]), r"rows is \[\]; allowed is a list"),
        (
            lambda content: content.update(format_version=2),
            r"format_version is 2; this version of .* reads 1",
        ),
        (lambda content: content.update(digest="x"), r"digest is 'x'; allowed are 16 hex digits"),
        (lambda content: content.update(date="yesterday"), r"date is 'yesterday'; allowed is a day"),
        (
            lambda content: content.update(model="other"),
            r"model and data are 'other' and 'digits'; allowed are",
        ),
        (lambda content: content.pop("machine"), r"the submission lacks machine"),
    ],
)
def test_what_is_wrong_in_a_submission_is_told(change: Callable[[Any], None], told: str, tmp_path: Path) -> None:
    place = submitted(tmp_path / "league", tmp_path / "results")
    changed(place, change)
    with pytest.raises(DataError, match=told) as raised:
        read_all(tmp_path / "league")
    assert str(raised.value).startswith(f"{place / 'submission.json'}: ")


def test_policies_of_a_submission_are_read_too(tmp_path: Path) -> None:
    place = submitted(tmp_path / "league", tmp_path / "results")
    policy = place / "policies/calibrated/keep-0.5.json"
    text = policy.read_text()
    policy.write_text(text.replace('"share": 0.5', '"share": 0.75'))
    with pytest.raises(DataError, match=r"keep-0.5.json: keep is 0.75; allowed is 0.5, the budget of its row"):
        read(place)
    policy.write_text("{")
    with pytest.raises(DataError, match=r"keep-0.5.json, of 'calibrated': "):
        read(place)
    policy.unlink()
    with pytest.raises(DataError, match=r"There is no policy at"):
        read(place)
    (place / "submission.json").write_text("[" * 10**5)
    with pytest.raises(DataError, match=r"submission.json cannot be read as JSON"):
        read(place)
    with pytest.raises(DataError, match=r"There is no folder"):
        read_all(tmp_path / "nothing")


def test_foreign_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    text = "<img src=x>|a](https://b)\x1b[2J\n# new"
    place = submitted(tmp_path / "league", tmp_path / "results")
    changed(place, row(3, method=text, figures=[{"name": text, "value": 0.5}]))
    changed(place, lambda content: content.update(machine=text, about=text, versions=[text], recipe=text))
    page = league_page(read_all(tmp_path / "league"), [])
    assert "&lt;img src=x&gt;\\|a\\](https&#58;//b)\\\\x1b\\[2J\\\\n# new" in page
    assert "<img" not in page and "https://b" not in page and "\x1b" not in page
    assert [line for line in page.splitlines() if line.startswith("# ")] == ["# League"]


def test_settings_that_nobody_ran_stand_as_empty_rows(tmp_path: Path) -> None:
    submitted(tmp_path / "league", tmp_path / "results")
    recipes = [read_recipe(name) for name in names()]
    submissions = read_all(tmp_path / "league")
    page, found = league_page(submissions, recipes), league_json(submissions, recipes)
    done, empty = page.split("## Published settings without a submission")
    assert "### digits-blip2" not in empty and "### digits-llava" in empty and "keep 0.25, digits_blip2, digits" in done
    assert "| pope-random |  |  |  |  |  |  |  |" in empty and "| 94.24 | 89.41 |" in empty
    tasks = {(one["recipe"], one["task"]) for one in found["open"]}
    assert tasks == {(one.name, task.name) for one in recipes for task in one.tasks} - {("digits-blip2", "digits")}
    changed(tmp_path / "league/digits_blip2/digits", lambda content: content.update(recipe="digits-llava"))
    other = league_json(read_all(tmp_path / "league"), recipes)["open"]
    assert {"digits-blip2", "digits-llava"} <= {one["recipe"] for one in other}, "it is of another model"
    assert "| stride (control) | 0.188 " in done and "| calibrated (pays more) | 100.0 | 50.0 |" in done
    assert json.dumps(found, allow_nan=False)


def test_a_page_that_is_not_what_the_folders_say_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = submitted(tmp_path / "league", tmp_path / "results")
    args = ["league", "--folder", str(tmp_path / "league"), "--output", str(tmp_path / "league.md")]
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--check", "true"])
    assert stopped.value.code == 1 and not (tmp_path / "league.md").exists()
    main(args)
    main([*args, "--check", "true"])
    capsys.readouterr()
    changed(place, row(3, accuracy=0.5))
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--check", "true"])
    assert stopped.value.code == 1
    assert "league.md is not what the folders in" in capsys.readouterr().out
