"""Test files stand on their own, and files of tests and package can be seen whole."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

TESTS = ROOT / "tests"
FILES = [file for file in TESTS.rglob("*.py") if not file.is_relative_to(TESTS / "existing_project")]
LONGEST = 300  # lines of a file


def imported(file: Path) -> Iterator[str]:
    """Names of the modules that a file imports, and of what it imports from them; programs that it writes too."""
    text = file.read_text(encoding="utf-8")
    yield from re.findall(r"\btests\.\w+\.test_\w+", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def test_no_test_file_is_imported() -> None:
    tests = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES if file.name.startswith("test_")}
    assert len(tests) > 100
    for file in FILES:
        for name in imported(file):
            assert not {name, name.rpartition(".")[0]} & tests, f"{file} imports {name}: move it to tests/support"


def test_every_file_is_short() -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {str(file): length for file, length in lengths.items() if length > LONGEST} == {}


def test_the_package_has_few_modules_at_its_root_and_no_file_above_300_lines() -> None:
    package = ROOT / "catp_lightning"
    assert len(list(package.glob("*.py"))) <= 4
    long = {
        file.name: count for file in package.rglob("*.py") if (count := len(file.read_text().splitlines())) > LONGEST
    }
    assert long == {}
