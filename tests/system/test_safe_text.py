"""Names of others on every surface: shown, and never obeyed by a terminal, Rich, Markdown or matplotlib."""

import ast
import html
import io
import json
import pickle
import random
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from matplotlib import rc_context
from rich.console import Console

import catp_lightning
from catp_lightning import PruningPolicy
from catp_lightning.calibration.report.page import page
from catp_lightning.calibration.report.promise import promise_broken, promise_kept, promise_section
from catp_lightning.calibration.report.report import candidate_rows, report
from catp_lightning.cli.main import main
from catp_lightning.errors import DataError, PolicyError, PruningError
from catp_lightning.evaluation.sweep.figure import figure
from catp_lightning.evaluation.sweep.table import ModelTable, combined
from catp_lightning.safe_text import LONGEST, figure_text, markdown_text, one_line, printable, rich_text
from catp_lightning.utils.markdown import markdown_table
from catp_lightning.utils.messages import rank_zero_info, rank_zero_warn, warn
from catp_lightning.utils.plots import png
from tests.support.hostile import HOSTILE, other_names
from tests.support.paths import ROOT
from tests.support.reports import calibrated

ACTING = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[PruningPolicy]:
    return calibrated(tmp_path_factory.mktemp("policies"), keep=[0.5, 2], augment="contrast")


def acts(text: str, allowed: str = "") -> list[str]:
    return [sign for sign in text if sign not in allowed and unicodedata.category(sign) in ACTING]


def drawn(count: int = 300) -> Iterator[str]:
    """Text of signs that mean something somewhere, the same on every machine."""
    draw = random.Random(0)
    signs = [
        *"\\`*_{}[]()<>#+-.!|~$&@:/^%\"' \t\n\r\x1b\x9b\x00\u202e\u2028\ud800ab1",
        "://",
        "www.",
        "![",
        "](",
        "<!--",
    ]
    for _ in range(count):
        yield "".join(draw.choices(signs, k=draw.randint(1, 12)))


def test_what_acts_is_written_out_and_nothing_else_changes() -> None:
    for text in [*HOSTILE.values(), *drawn()]:
        line = one_line(text)
        assert not acts(line) and not acts(printable(text), "\n\t")
        assert one_line(line) == line, "once is enough"
        assert printable(text).count("\n") == text.count("\n")
        assert not acts(text) or line != text
    for plain in ("digits_blip2", "runs/größe, 猫", "a\\b [x] $5"):
        assert one_line(plain) == plain


@pytest.mark.parametrize("kind", [PolicyError, DataError, PruningError])
def test_errors_are_one_line_that_is_safe_in_every_process(kind: type[Exception]) -> None:
    for text in HOSTILE.values():
        error = pickle.loads(pickle.dumps(kind(f"{text} is wrong")))
        assert type(error) is kind and str(error) == one_line(f"{text} is wrong")
    told = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback\n  \x1b[2J"
    assert str(kind(told)) == told.replace("\x1b", "\\x1b"), "a traceback keeps its lines"


def test_warnings_and_lines_are_safe_and_told_at_the_callers_line(caplog: pytest.LogCaptureFixture) -> None:
    for text in HOSTILE.values():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn(text)
            rank_zero_warn(text)
        assert [str(warning.message) for warning in caught] == [one_line(text)] * 2
        assert [warning.filename for warning in caught] == [__file__] * 2
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            caplog.clear()
            rank_zero_info(text)
        assert [record.getMessage() for record in caplog.records] == [one_line(text)]


@pytest.mark.parametrize("name", HOSTILE)
def test_the_command_line_shows_an_error_and_obeys_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fails(*_: object) -> None:
        raise ValueError(HOSTILE[name])

    monkeypatch.setattr("catp_lightning.cli.main._run", fails)
    with pytest.raises(SystemExit):
        main(["demo"])
    told = capsys.readouterr().err
    assert told == f"\ncatp: error: ValueError: {printable(HOSTILE[name])}\n" and not acts(told, "\n")


def row(method: str, keep: float | None, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "keep": keep, "tokens": 3.0, "accuracy": 1.0, "accuracy_interval": [1.0, 1.0],
        "accuracy_share": 1.0, "agreement": 1.0, "agreement_interval": [1.0, 1.0], "reference_ahead": 0.0,
        "reference_ahead_interval": [0.0, 0.0], "control": False, **more,
    }  # fmt: skip


def rows(name: str) -> list[dict[str, Any]]:
    return [row("no pruning", None), row(name, 0.5), row("fine", 0.5, control=True)]


def shown(*renderables: Any) -> str:
    """What a terminal is sent, of colours freed."""
    console = Console(file=io.StringIO(), width=20_000, force_terminal=True, color_system="truecolor")
    for renderable in renderables:
        console.print(renderable)
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", HOSTILE)
def test_terminal_tables_show_a_name_as_it_is(name: str) -> None:
    text = HOSTILE[name]
    table = ModelTable(text, "12 questions.", text, rows(text))
    for output in (shown(*table.console()), shown(rich_text(text, "bold"))):
        assert one_line(text) in output and not acts(output, "\n")


def rendered(text: str) -> tuple[str, set[str]]:
    """Markdown as a page shows it: its words, and the tags it has."""
    written = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    return html.unescape(re.sub(r"<[^>]*>", "", written)), set(re.findall(r"<(\w+)", written))


PLAIN = {"p", "h1", "h2", "h3", "ul", "li", "em", "strong", "table", "thead", "tbody", "tr", "th", "td"}


def test_markdown_shows_any_name_as_it_is() -> None:
    for text in [*HOSTILE.values(), *drawn()]:
        words, tags = rendered(f"a {markdown_text(text)} b")
        assert tags == {"p"} and words.strip() == f"a {one_line(text)} b", text
        words, tags = rendered(markdown_table(["m", text], [[text, "1"], [text, "2"]]))
        assert tags <= PLAIN - {"em", "strong"}, text
        assert [line.strip() for line in words.split("\n") if line.strip()].count(one_line(text).strip()) == 3 or not (
            one_line(text).strip()
        )
        assert "://" not in markdown_text(text) and "www." not in markdown_text(text), "no bare address"


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_of_comparisons_and_sweeps_hold_a_name_as_it_is(name: str) -> None:
    text = HOSTILE[name]
    table = ModelTable(text, "12 questions.", text, rows(text), {f"other {text}": f"why {text}"})
    for written in (table.markdown(), combined([table, table])):
        words, tags = rendered(written)
        assert tags <= PLAIN and one_line(text).strip() in words and not acts(written, "\n")


@pytest.mark.slow
def test_a_calibrations_page_holds_names_as_they_are(policies: list[PruningPolicy]) -> None:
    for text in HOSTILE.values():
        hostile = [PruningPolicy.from_dict(other_names(policies[0].to_dict(), text))]
        written = page(hostile, {"chosen": f"{text} at keep 0.5"}, ["retention"])
        words, tags = rendered(written)
        assert tags <= PLAIN | {"img"} and not acts(written, "\n")
        assert re.findall(r'<img src="([^"]*)"', MarkdownIt().render(written)) == ["retention.png"]
        assert words.count(one_line(text).strip()) > 5


def test_a_promises_groups_are_called_by_their_names_as_they_are() -> None:
    stored = json.loads((ROOT / "tests/golden/digits_llava-all-promise-0.json").read_text())
    own = PruningPolicy.from_dict(stored[0])
    for text in HOSTILE.values():
        groups = [{"name": name, "images": 90, "questions": 180, "most_questions": 2} for name in (text, "other")]
        found = [{"name": group["name"], "disagreed": 3, "bound": 0.1} for group in groups]
        step = {"keep": 0.5, "disagreed": 6, "bound": 0.1, "tested": True, "holds": True, "groups": found}
        promise = {"max_disagreement": 0.2, "confidence": 0.9, "images": 90, "questions": 360, "most_questions": 2}
        of = {"over": "questions", "group_by": text, "group_confidence": 0.95, "groups": groups, "steps": [step]}
        policy = replace(own, evidence={**own.evidence, "promise": {**promise, **of}})
        written = promise_section(policy)
        words, tags = rendered(written)
        assert tags <= PLAIN and not acts(written, "\n") and words.count(one_line(text).strip()) == 2
        assert one_line(text) in promise_kept(policy.evidence["promise"])
        assert not acts(promise_kept(policy.evidence["promise"]) + promise_broken(policy.evidence["promise"]))


@pytest.mark.slow
def test_a_calibrations_report_is_drawn_and_logged_whatever_names_are(
    policies: list[PruningPolicy], tmp_path: Path
) -> None:
    text = HOSTILE["formula"] + HOSTILE["clears the screen"]
    hostile = [PruningPolicy.from_dict(other_names(policy.to_dict(), text)) for policy in policies]
    lines = report(hostile, [], tmp_path, [], 1.0)
    assert text in lines[0] and len(list(tmp_path.glob("*.png"))) >= 3
    assert not acts(str(candidate_rows(hostile[0])))


def test_figures_draw_names_as_they_are() -> None:
    names = list(HOSTILE.values())
    several = [row("no pruning", None), *(row(text, keep) for text in names for keep in (0.5, 0.25))]
    table = ModelTable(HOSTILE["formula"], "", HOSTILE["html"], several)
    drawing = figure([table])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png(drawing).startswith(b"\x89PNG")
    words = {artist.get_text() for artist in drawing.legends[0].get_texts()}
    assert words == {"no pruning", *map(figure_text, names)} and max(map(len, words)) <= LONGEST + 1


def test_no_formula_and_no_tex_is_drawn_whatever_matplotlibs_settings_say() -> None:
    def pixels(name: str) -> bytes:
        return png(figure([ModelTable("m", "", "fine", rows(name))]))

    assert pixels("$xy$") != pixels("xy")
    with rc_context({"text.usetex": True}):
        assert pixels(r"\input{x}").startswith(b"\x89PNG")


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call in the package: where, the call, and what is called."""
    folder = Path(catp_lightning.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(folder)}:{node.lineno}", node, ast.unparse(node.func)


SAFE = ("rich_text(", "one_line(", "printable(", "Text.assemble(")
NUMBERS = {"calibration_questions", "questions", "policy.keep"}


def test_every_line_and_warning_of_ours_goes_through_the_place_that_makes_it_safe() -> None:
    unsafe = []
    for place, call, name in calls():
        if place.startswith(("utils/messages.py", "safe_text.py")):
            continue
        if name in ("warnings.warn", "rank_zero.rank_zero_warn", "rank_zero.rank_zero_info"):
            unsafe.append(f"{place}: {name}; use catp_lightning.utils.messages")
        shown = ast.unparse(call)
        if name in ("tqdm", "set_postfix_str") and "one_line(" not in shown and "desc='catp'" not in shown:
            unsafe.append(f"{place}: {name} shows a name as it is")
        if name == "print" or name.endswith((".print", ".add_row")):
            for argument in call.args:
                values = [value.value for value in ast.walk(argument) if isinstance(value, ast.FormattedValue)]
                written = ast.unparse(argument)
                if not written.startswith(SAFE) and any(ast.unparse(value) not in NUMBERS for value in values):
                    unsafe.append(f"{place}: {written[:80]}")
    assert not unsafe


@pytest.mark.slow
def test_the_demo_ends_well_in_a_folder_that_is_called_like_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a[/]b:skull:"
    main(["demo", "--output", str(folder), "--questions", "8", "--calibration_questions", "24"])
    assert "a[/]b:skull:" in capsys.readouterr().out.replace("\n", "")
    assert (folder / "digits_blip2" / "table.md").is_file()
