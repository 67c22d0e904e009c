"""Scorers of other packages: found by name, imported when asked for, and told apart from what is broken."""

import re
import runpy
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import Tensor

from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.methods.registry import Registry
from catp_lightning.methods.scorers import SCORERS, Scorer
from catp_lightning.methods.scorers.controls import Random, Stride
from catp_lightning.methods.selectors import SELECTORS
from tests.support.contributing import section
from tests.support.paths import ROOT

MODULES = {
    "good": "from catp_lightning.methods.scorers.controls import Stride\nclass Good(Stride):\n    pass\n",
    "fails": "import a_library_that_is_not_there\n",
    "quits": "raise SyntaxError('made by hand')\n",
    "exits": "import sys\nsys.exit(3)\n",
    "interrupts": "raise KeyboardInterrupt\n",
    "base": "class Odd(BaseException): pass\nraise Odd('made by hand')\n",
    "signalled": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n",
    "shown": "class Meta(type):\n    def __repr__(cls): raise SystemExit(4)\nclass Good(metaclass=Meta): pass\n",
    "hints": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from catp_lightning.methods.scorers.controls import Stride\n"
        "@dataclass(frozen=True)\nclass Good(Stride):\n    number: Nowhere = 3\n"
    ),
    "needs": (
        "from catp_lightning.methods.scorers.controls import Stride\nclass Good(Stride):\n    needs = ['outputs']\n"
        "class Failing(Stride):\n    @property\n    def needs(self): raise SystemExit(5)\n"
        "class Quits(Stride):\n    def __init__(self): raise SystemExit(6)\n"
    ),
    "wrong": "class Good:\n    pass\nnumber = 3\n",
    "abstract": "from catp_lightning.methods.scorers import Scorer\n"
    "class Good(Scorer):\n    def score(self, seen): ...\n",
    "asks": (
        "from dataclasses import dataclass\nfrom catp_lightning.methods.scorers.controls import Stride\n"
        "@dataclass(frozen=True)\nclass Good(Stride):\n    number: int\n"
    ),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a package with entry points where Python finds it: installed, as far as importlib.metadata can tell."""

    def install(package: str, **points: str) -> None:
        folder = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{name.replace('_', '-')} = {value}" for name, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[catp_lightning.scorers]", *lines]))

    for name, code in MODULES.items():
        (tmp_path / f"outside_{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, f"outside_{name}", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    for name in MODULES:
        sys.modules.pop(f"outside_{name}", None)


def test_a_scorer_of_another_package_is_imported_when_it_is_looked_up_and_not_before(
    install: Callable[..., None],
) -> None:
    install("catp-good", brand_new="outside_good:Good")
    registry = Registry("scorer", Scorer, {"random": Random})
    assert "brand-new" in registry and list(registry) == ["random", "brand-new"] and len(registry) == 2
    assert registry["random"] is Random and "nothing" not in registry and registry.get("nothing") is None
    assert "outside_good" not in sys.modules
    assert issubclass(registry["brand-new"], Stride) and dict(registry.items())["brand-new"] is registry["brand-new"]
    assert "outside_good" in sys.modules
    with pytest.raises(KeyError):
        registry["nothing"]


def test_iterating_over_the_values_imports_all(install: Callable[..., None]) -> None:
    install("catp-good", brand_new="outside_good:Good")
    registry = Registry("scorer", Scorer, {"random": Random})
    assert "outside_good" not in sys.modules
    assert [cls.__name__ for cls in registry.values()] == ["Random", "Good"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            "outside_fails:Good",
            "cannot be imported: ModuleNotFoundError: .*'a_library_that_is_not_there'",
        ),
        ("outside_quits:Good", "cannot be imported: SyntaxError: made by hand"),
        ("outside_good:Missing", "cannot be imported: AttributeError: .*Missing"),
        (
            "outside_wrong:Good",
            "is not a class under catp_lightning.methods.Scorer, but <class 'outside_wrong.Good'>",
        ),
        ("outside_wrong:number", "is not a class under catp_lightning.methods.Scorer, but 3"),
        ("outside_abstract:Good", "lacks needs"),
        ("outside_asks:Good", "cannot be made without arguments: TypeError"),
        ("outside_exits:Good", "cannot be imported: SystemExit: 3"),
        ("outside_interrupts:Good", "cannot be imported: KeyboardInterrupt"),
        ("outside_base:Good", "cannot be imported: Odd: made by hand"),
        ("outside_shown:Good", "is not a scorer: SystemExit: 4"),
        ("outside_hints:Good", "is not a scorer: NameError: name 'Nowhere' is not defined"),
        ("outside_needs:Good", r"has needs that are not a mapping of .*Signal, but \['outputs'\]"),
        ("outside_needs:Failing", "cannot be made without arguments: SystemExit: 5"),
        ("outside_needs:Quits", "cannot be made without arguments: SystemExit: 6"),
    ],
)
def test_a_broken_one_says_which_package_and_why_and_only_when_used(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, value: str, says: str
) -> None:
    install("catp-broken", broken=value)
    registry = Registry("scorer", Scorer, {"random": Random})
    for module in ("policy", "building"):
        monkeypatch.setattr(f"catp_lightning.policy.{module}.SCORERS", registry)
    assert PruningPolicy(scorer="random").build_scorer() == Random()
    expected = rf"scorer 'broken' of the package catp-broken 1\.2 \(entry point broken = {value}\) {says}"
    with pytest.raises(PolicyError, match=expected):
        PruningPolicy(scorer="broken")


def test_all_that_work_are_listed_whatever_the_others_raise(install: Callable[..., None]) -> None:
    values = {"quits": "exits", "stops": "interrupts", "odd": "base", "shown": "shown", "hints": "hints"}
    install("catp-broken", **{name: f"outside_{module}:Good" for name, module in values.items()})
    install("catp-good", brand_new="outside_good:Good")
    with pytest.warns(UserWarning, match="It is left out") as caught:
        assert [name for name, _ in Registry("scorer", Scorer, {"random": Random}).usable()] == ["random", "brand-new"]
    assert len(caught) == len(values)


def test_ctrl_c_while_a_scorer_is_imported_is_not_that_scorers_fault(install: Callable[..., None]) -> None:
    install("catp-slow", slow="outside_signalled:Good")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Registry("scorer", Scorer, {"random": Random})["slow"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_scheduler_that_stops_the_process_is_heard_while_a_scorer_is_imported(
    install: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "outside_signalled.py").write_text(MODULES["signalled"].replace("SIGINT", "SIGTERM"))
    install("catp-slow", slow="outside_signalled:Good")

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit, match="143"):
            Registry("scorer", Scorer, {"random": Random})["slow"]
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_scorer_is_imported_in_another_thread_too(install: Callable[..., None]) -> None:
    install("catp-stops", stops="outside_interrupts:Good", brand_new="outside_good:Good")
    registry = Registry("scorer", Scorer, {"random": Random})
    with ThreadPoolExecutor(1) as pool:
        assert issubclass(pool.submit(registry.__getitem__, "brand-new").result(), Stride)
        with pytest.raises(PolicyError, match="cannot be imported: KeyboardInterrupt"):
            pool.submit(registry.__getitem__, "stops").result()


def test_a_name_of_our_own_stays_ours_with_one_warning(install: Callable[..., None]) -> None:
    install("catp-taker", random="outside_good:Good", other="outside_good:Good")
    registry = Registry("scorer", Scorer, {"random": Random})
    with pytest.warns(UserWarning, match=r"package catp-taker 1\.2 brings a scorer named 'random'") as caught:
        assert registry["random"] is Random
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry["random"] is Random and list(registry) == ["random", "other"]


def test_two_packages_with_one_name_are_both_named(install: Callable[..., None]) -> None:
    install("catp-one", same="outside_good:Good")
    install("catp-two", same="outside_good:Good")
    with pytest.raises(
        PolicyError, match=r"catp-(one|two) 1\.2 and the package catp-(one|two) 1\.2 each bring .*'same'"
    ):
        Registry("scorer", Scorer, {"random": Random})["same"]


def test_an_unknown_name_is_answered_with_the_nearest_of_other_packages_too(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("catp-good", brand_new="outside_fails:Good")
    registry = Registry("scorer", Scorer, {"random": Random})
    for module in ("policy", "building"):
        monkeypatch.setattr(f"catp_lightning.policy.{module}.SCORERS", registry)
    with pytest.raises(PolicyError, match=r"known are brand-new, random\. Did you mean 'brand-new'\?"):
        PruningPolicy(scorer="brandnew")


@pytest.mark.slow
def test_what_contributing_says_about_a_package_outside_works_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = section("Add a method from outside")
    blocks = re.findall(r"`(\w+\.(?:toml|py))`(?:(?!```).)*```\w+\n(.*?)```", told, flags=re.DOTALL)
    files = {name: textwrap.dedent(code) for name, code in blocks}
    assert list(files) == ["pyproject.toml", "catp_largest_feature.py", "use.py"]
    (command,) = re.findall(r"```console\n\s*(.*?)\n\s*```", told)
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    installs = [sys.executable, "-m", *command.split(), *offline, "--target", "installed"]
    done = subprocess.run(installs, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (tmp_path / "catp_largest_feature.py").unlink()  # what was installed is used
    for registry in (SCORERS, SELECTORS):
        assert not {"largest-feature", "bottom-k"} & {*registry}, "entry points were read without the package"
        monkeypatch.delitem(vars(registry), "_others")
        monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.syspath_prepend(tmp_path / "installed")
    assert "largest-feature" in SCORERS and "bottom-k" in SELECTORS and "catp_largest_feature" not in sys.modules
    used = runpy.run_path(str(tmp_path / "use.py"))
    assert capsys.readouterr().out == "8 of 32 tokens stay\n"
    features: list[Tensor] = []
    used["model"].qformer.register_forward_hook(lambda module, args, output: features.append(output[0]))
    with prune(used["model"], PruningPolicy(scorer="largest-feature", selector="bottom-k", keep=8)) as lowest:
        used["model"](**used["inputs"])
    slow = [max(abs(number) for number in token) ** 2 for token in features[0][0].tolist()]
    assert used["pruning"].scores[0].tolist() == pytest.approx(slow, rel=1e-5)
    for sign, kept in ((-1, used["pruning"].keep), (1, lowest.keep)):
        assert kept[0].nonzero()[:, 0].tolist() == sorted(sorted(range(32), key=lambda n: sign * slow[n])[:8])
    del sys.modules["catp_largest_feature"]


@pytest.mark.parametrize(
    ("title", "most"),
    [
        ("Add a scorer", 3),
        ("Add a selector", 3),
        ("Add a model family", 3),
        ("Add a place where tokens leave", 4),
        ("Add a statistic", 3),
    ],
)
def test_every_recipe_names_few_files_to_understand_and_none_that_is_not_there(title: str, most: int) -> None:
    told = section(title)
    (understand,) = re.findall(r"^Files to understand:(.*?)\n\n", told, flags=re.DOTALL | re.MULTILINE)
    files = [name for name in re.findall(r"`([\w/]+\.\w+)`", told) if "/" in name]
    assert 2 < len(re.findall(r"`([\w/]+\.py)`", understand)) <= most
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_steps_to_a_scorer_name_what_is_there() -> None:
    told = section("Add a scorer")
    assert "one line in `_OWN`" in told and "`catp_lightning/methods/scorers/__init__.py`" in told
    (example,) = re.findall(r"```python\n(.*?)```", told, flags=re.DOTALL)
    names = "from dataclasses import dataclass\nfrom torch import Tensor\n"
    names += "from catp_lightning.methods import Needs, Observation, Scorer, Signal\n"
    namespace: dict[str, type] = {}
    exec(names + textwrap.dedent(example), namespace)
    own = {**{name: SCORERS[name] for name in ("random", "stride")}, "l1-norm": namespace["L1Norm"]}
    registry = Registry("scorer", Scorer, own)
    assert registry["l1-norm"]().needs
