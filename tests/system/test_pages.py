"""The project's pages: links lead somewhere, and what they say of the package is what it says of itself."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for place in ("", "docs/**/", "examples/**/", ".github/**/") for page in ROOT.glob(f"{place}*.md"))


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        there = page.parent / path if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append(target)
    assert not lost


def test_the_pages_are_those_of_the_project() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "AGENTS.md", "SECURITY.md", "docs/design.md", ".github/ISSUE_TEMPLATE/new_model.md"} <= names


def test_what_is_cited_is_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


def test_paths_that_agents_are_told_of_exist() -> None:
    named = re.findall(r"`((?:tests|docs|catp_lightning)/[\w/.]+)`", (ROOT / "AGENTS.md").read_text(encoding="utf-8"))
    assert len(named) >= 3 and [name for name in named if not (ROOT / name).exists()] == []


def test_the_package_runs_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["catp_lightning", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("catp_lightning", run_name="__main__")
    assert not stopped.value.code and capsys.readouterr().out.startswith("catp-lightning ")


@pytest.mark.slow
def test_the_blocks_of_the_first_page_run_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/start.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {"__name__": "start"}
    for block in blocks:
        exec(compile(block, "docs/start.md", "exec"), names)
    written = {
        "policy.json",
        "policy-report/report.md",
        "policies/keep-0.5.json",
        "llava-catp-25/README.md",
        "kept.png",
    }
    assert {name for name in written if (tmp_path / name).is_file()} == written
