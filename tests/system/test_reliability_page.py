"""What docs/reliability.md says was tried is a test, which runs where the page says."""

import ast
import re
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

ROW = re.compile(r"^\|(?P<tried>[^|]+)\|(?P<how>[^|]+)\|(?P<happened>[^|]+)\|(?P<tests>[^|]+)\|$")
TEST = re.compile(r"`(?P<file>test_\w+)::(?P<name>test_\w+)`(?P<slow> \(slow\))?")


def rows() -> list[re.Match[str]]:
    lines = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := ROW.match(line))]
    return [match for match in found if match["tests"].strip().strip("-") not in ("", "test")]


@cache
def there_in(file: Path) -> dict[str, bool]:
    """Names of the tests in a file, and whether each is slow as a whole."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    whole = [
        ast.unparse(node.value) for node in body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
    ]
    slow = any("pytest.mark.slow" in marks for marks in whole)
    return {
        node.name: slow or any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_row_names_tests_that_exist_and_says_which_are_slow() -> None:
    assert len(rows()) > 60
    files = {file.stem: file for file in (ROOT / "tests").rglob("test_*.py")}
    for row in rows():
        named = list(TEST.finditer(row["tests"]))
        assert named, f"no test in the row {row['tried']!r}"
        for test in named:
            there = there_in(files[test["file"]])
            assert test["name"] in there, test[0]
            assert there[test["name"]] == bool(test["slow"]), f"{test[0]}: slow or not?"


def test_every_file_of_tests_has_a_name_of_its_own() -> None:
    names = [file.stem for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "the page names a test by its file, without the folder"


def test_no_row_stands_twice() -> None:
    tried = [row["tried"].strip() for row in rows()]
    assert len(tried) == len(set(tried))
