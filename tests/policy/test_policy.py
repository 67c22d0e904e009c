"""A policy is saved whole, loads as it was, and refuses with the value and what is allowed."""

import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.policy import locations
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.utils.files import write_text

DPP = PruningPolicy(
    scorer="catp",
    scorer_args={"layers": [0, -1], "head_weights": [[1.0, -0.5], [0, 2]]},
    selector="dpp",
    selector_args={"relevance": -1.5, "similarity": "outputs"},
    keep=0.25,
    model={"type": "blip-2", "name": "x", "visual_tokens": 32},
    evidence={"chosen": "something"},
)


@pytest.mark.parametrize("keep", [1.0, 1, 0.25, 16])
def test_a_policy_loads_as_it_was_saved(tmp_path: Path, keep: float) -> None:
    policy = DPP.with_keep(keep)
    assert policy.save(tmp_path / "deep" / "policy.json") == tmp_path / "deep" / "policy.json"
    loaded = PruningPolicy.load(tmp_path / "deep" / "policy.json")
    assert loaded == policy and type(loaded.keep) is type(keep)
    written = json.loads((tmp_path / "deep" / "policy.json").read_text())["keep"]
    assert written == ({"tokens": keep} if isinstance(keep, int) else {"share": keep})
    assert PruningPolicy.load(tmp_path / "deep") == policy, "a folder will do"
    assert policy.save(tmp_path / "folder") == tmp_path / "folder" / "policy.json"


def test_every_name_constructs_with_keep_alone() -> None:
    for name in SCORERS:
        assert PruningPolicy(scorer=name, keep=0.1).build_scorer() is not None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"scorer": "cat"}, r"no scorer 'cat'; known are catp, .*stride.*\. Did you mean 'catp'"),
        ({"scorer": None}, "no scorer None; known are"),
        ({"selector": "dp"}, "no selector 'dp'; known are .*dpp.*top-k"),
        ({"keep": 0.0}, r"keep is 0\.0; keep is a share, a float in \(0, 1\]"),
        ({"keep": 1.5}, r"keep is 1\.5"),
        ({"keep": 16.0}, "For 16 tokens write keep=16, without the point"),
        ({"keep": 0}, "keep is 0;"),
        ({"keep": -3}, "keep is -3;"),
        ({"keep": True}, "keep is True;"),
        ({"keep": "0.5"}, "keep is '0.5';"),
        ({"keep": float("nan")}, "keep is nan;"),
        ({"keep": float("inf")}, "keep is inf;"),
        ({"positions": "none"}, "positions is 'none'; allowed are original, compact"),
        (
            {"scorer_args": {"layer": 1}},
            "scorer 'catp' has no argument 'layer'; it takes head_weights, image_weight, layers",
        ),
        (
            {"scorer_args": {"layers": [0.5]}},
            r"layers of scorer 'catp' is \[0\.5\]; allowed is a list of \(a whole number\)",
        ),
        ({"scorer_args": {"layers": [True]}}, "layers of scorer 'catp'"),
        ({"scorer_args": {"head_weights": [[float("nan")]]}}, "scorer_args holds something JSON cannot"),
        (
            {"scorer_args": {"image_weight": "x"}},
            "image_weight of scorer 'catp' is 'x'; allowed is 'none' or 'received'",
        ),
        ({"scorer_args": [1]}, "scorer_args must be a dictionary"),
        ({"selector_args": {"relevance": 1.0}}, "selector 'top-k' has no argument 'relevance'; it takes per"),
        ({"selector": "dpp", "selector_args": {"relevance": "high"}}, "relevance of selector 'dpp' is 'high'"),
        ({"model": "blip-2"}, "model must be a dictionary"),
        ({"evidence": {"x": float("inf")}}, "evidence holds something JSON cannot"),
        ({"format_version": "1"}, "format_version is '1'"),
    ],
)
def test_a_wrong_field_is_refused_with_its_value_and_what_is_allowed(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        PruningPolicy(**fields)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read as a policy"),
        ('{"scorer": "catp"', "cannot be read as a policy"),
        ("[1, 2]", "a policy must be a dictionary"),
        ('{"keep": {"share": NaN}}', "NaN is not a number a policy may hold"),
        ('{"keep": 0.5}', r'keep is 0\.5; in a file it is \{"share": 0\.5\}'),
        ('{"keep": {"share": true}}', "keep is {'share': True}"),
        ('{"keep": {"tokens": 1.5}}', "keep is {'tokens': 1.5}"),
        ('{"keep": {"share": 2}}', r"keep is 2\.0"),
        ('{"scorer": ["catp"]}', "scorer and selector are names"),
        ('{"scorer": "nonsense"}', "no scorer 'nonsense'"),
        ("[" * 100_000, "cannot be read as a policy"),
        ("\udcff", "cannot be read as a policy"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "policy.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PolicyError, match=says) as error:
        PruningPolicy.load(file)
    assert str(file) in str(error.value)


def test_unknown_newer_keys_warn_and_are_left_out(tmp_path: Path) -> None:
    file = DPP.save(tmp_path / "policy.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 2, "format_version": 7}))
    with (
        pytest.warns(UserWarning, match="does not know: temperature"),
        pytest.warns(UserWarning, match=r"has format_version 7, .* reads up to 1: .* Update catp-lightning"),
    ):
        loaded = PruningPolicy.load(file)
    assert loaded == DPP, "what is saved again is of this version"
    with pytest.raises(PolicyError, match=r"format_version is 2; this version of catp-lightning has 1"):
        PruningPolicy(format_version=2)


@pytest.mark.parametrize(
    ("text", "keys", "keep"),
    [
        ('{"keep": {"share": 1}, "scorer": "catp", "keep": {"share": 0.1}, "scorer": "dart"}', "'keep', 'scorer'", 0.1),
        ('{"keep": {"share": 0.9, "share": 0.2}}', "'share'", 0.2),
        ('{"keep": {"tokens": 3}, "scorer_args": {"layers": [0], "layers": [1]}}', "'layers'", 3),
        ('{"keep": {"tokens": 3}, "evidence": {"x": [{"a": 1, "a": 1}]}}', "'a'", 3),
    ],
)
def test_a_key_that_stands_twice_is_told(tmp_path: Path, text: str, keys: str, keep: float) -> None:
    file = tmp_path / "policy.json"
    file.write_text(text)
    with pytest.warns(UserWarning, match=f"policy.json says more than once: {keys}. What stands last is used"):
        assert PruningPolicy.load(file).keep == keep


def test_a_folder_of_several_budgets_is_asked_by_keep(tmp_path: Path) -> None:
    for keep in (0.5, 0.25, 8):
        DPP.with_keep(keep).save(tmp_path / f"keep-{keep}.json")
    assert PruningPolicy.load(tmp_path, keep=8).keep == 8
    with pytest.raises(PolicyError, match=r"several budgets \(0\.25, 0\.5, 8\): name one with keep"):
        PruningPolicy.load(tmp_path)
    with pytest.raises(PolicyError, match=r"no policy for keep=0\.1; it has 0\.25, 0\.5, 8"):
        PruningPolicy.load(tmp_path, keep=0.1)
    single = tmp_path / "single"
    DPP.save(single)
    assert PruningPolicy.load(single, keep=0.25) == DPP
    with pytest.raises(PolicyError, match=r"is for keep=\{'share': 0\.25\}, not 1"):
        PruningPolicy.load(single, keep=1)


def test_a_file_is_read_once_and_what_was_read_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer replaces the file as often as somebody opens it: what is used is what was asked for, or refused."""
    file, real, opened = tmp_path / "keep-0.5.json", locations.read_bytes, []

    def replacing(path: Path, most: int) -> bytes:
        content = real(path, most)
        opened.append(path)
        DPP.with_keep(0.9).save(file)
        return content

    monkeypatch.setattr(locations, "read_bytes", replacing)
    for place in (file, tmp_path):
        DPP.with_keep(0.5).save(file)
        assert PruningPolicy.load(place, keep=0.5).keep == 0.5
        with pytest.raises(PolicyError, match=r"is for keep=\{'share': 0\.9\}, not 0\.5"):
            PruningPolicy.load(place, keep=0.5)
    assert opened == [file] * 4


def test_a_file_without_a_budget_is_for_the_default_one(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text('{"scorer": "stride"}')
    assert PruningPolicy.load(file, keep=0.5) == PruningPolicy("stride") == PruningPolicy.load(file)
    with pytest.raises(PolicyError, match=r"is for keep=\{'share': 0\.5\}, not 0\.25"):
        PruningPolicy.load(file, keep=0.25)


def found_by(calibration: str, *budgets: float) -> list[PruningPolicy]:
    """Policies as one calibration makes them: what they have in common is in the evidence of each."""
    evidence = {"retention": [{"keep": keep, "agreement": 0.9} for keep in budgets], "fitted": {"by": calibration}}
    return [PruningPolicy("stride", keep=keep, evidence={**evidence, "chosen": str(keep)}) for keep in budgets]


def test_policies_of_two_calibrations_in_a_folder_are_told_apart(tmp_path: Path) -> None:
    for policy in found_by("first", 0.5, 0.25):
        policy.save(tmp_path / budget_file_name(policy.keep))
    PruningPolicy("stride", keep=0.75).save(tmp_path / "keep-0.75.json")  # by hand: nothing was measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for keep in (0.5, 0.25, 0.75):
            assert PruningPolicy.load(tmp_path, keep=keep).keep == keep
    (new,) = found_by("first", 0.5)
    new.save(tmp_path / "keep-0.5.json")
    with pytest.warns(UserWarning, match=r"calibrations: keep-0\.25\.json, which is used, .* keep-0\.5\.json, "):
        assert PruningPolicy.load(tmp_path, keep=0.25) == found_by("first", 0.5, 0.25)[1]
    with pytest.warns(UserWarning, match=r"different calibrations: keep-0\.5\.json, which is used, .*keep-0\.25"):
        assert PruningPolicy.load(tmp_path, keep=0.5) == new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PruningPolicy.load(tmp_path / "keep-0.25.json").keep == 0.25, "a file is what was asked for"


def test_a_single_policy_beside_budgets_of_another_calibration_is_told(tmp_path: Path) -> None:
    for policy in found_by("first", 0.5, 0.25):
        policy.save(tmp_path / budget_file_name(policy.keep))
    (single,) = found_by("second", 0.5)
    single.save(tmp_path)
    with pytest.warns(UserWarning, match=r"policy\.json, which is used, .* keep-0\.25\.json, keep-0\.5\.json"):
        assert PruningPolicy.load(tmp_path) == single
    with pytest.warns(UserWarning, match=r"keep-0\.5\.json, which is used, .* policy\.json"):
        assert PruningPolicy.load(tmp_path, keep=0.5) != single


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"There is no policy at 'nowhere\.json'"):
        PruningPolicy.load("nowhere.json")
    with pytest.raises(PolicyError, match=r"neither policy\.json nor keep"):
        PruningPolicy.load(tmp_path)
    with pytest.raises(PolicyError, match="could not be fetched from the Hugging Face hub"):
        PruningPolicy.load("hf://nobody/nothing")
    with pytest.raises(PolicyError, match="could not be fetched from Weights & Biases"):
        PruningPolicy.load("wandb://nobody/nothing/policy:latest")


def test_a_hub_repository_is_read_from_the_hubs_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout huggingface_hub itself keeps: what a download leaves behind, and an offline machine reads."""
    revision = "0" * 40
    repository = tmp_path / "models--me--policy"
    DPP.save(repository / "snapshots" / revision / "policy.json")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert PruningPolicy.load("hf://me/policy") == DPP


def test_a_hub_address_pins_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/3": "c" * 40}
    repository = tmp_path / "models--me--policy"
    for n, (name, commit) in enumerate(commits.items()):
        DPP.with_keep(n + 1).save(repository / "snapshots" / commit / "policy.json")
        write_text(repository / "refs" / name, commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    addresses = ["", "@v1", "@refs/pr/3", f"@{'b' * 40}", "@main"]
    assert [PruningPolicy.load(f"hf://me/policy{revision}").keep for revision in addresses] == [1, 2, 3, 2, 1]
    with pytest.raises(PolicyError, match=r"hf://me/policy@v9 could not be fetched .*Check the name, the revision"):
        PruningPolicy.load("hf://me/policy@v9")
    with pytest.raises(PolicyError, match="names no revision after the @"):
        PruningPolicy.load("hf://me/policy@")
    with pytest.raises(PolicyError, match=r"hf://me/policy@v1: .* is for keep=\{'tokens': 2\}, not 5"):
        PruningPolicy.load("hf://me/policy@v1", keep=5)


@pytest.mark.parametrize("content", ['{"keep": {"share": 0.5}}', "{", None])
def test_an_artifact_leaves_no_folder_behind_whatever_becomes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    class Artifact:
        def download(self, root: str) -> str:
            (Path(root) / "policy.json").write_text("{" if content is None else content)
            if content is None:
                raise ConnectionError("the network is gone")
            return root

    asked = []

    def artifact(self: object, name: str, type: str) -> Artifact:
        asked.append((name, type))
        return Artifact()

    monkeypatch.setattr("wandb.Api", type("Api", (), {"artifact": artifact}))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if content and content != "{":
        assert PruningPolicy.load("wandb://a/b/c:v7").keep == 0.5
    else:
        with pytest.raises(PolicyError, match=r"wandb://a/b/c:v7.*(could not be fetched|cannot be read as a policy)"):
            PruningPolicy.load("wandb://a/b/c:v7")
    assert not list(tmp_path.iterdir()) and asked == [("a/b/c:v7", "catp-policy")]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = DPP.save(tmp_path / "policy.json")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        PruningPolicy().save(file)
    monkeypatch.undo()
    assert PruningPolicy.load(file) == DPP
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"], "no half-written file stays"


def test_a_written_file_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        file = write_text(tmp_path / "x", "text")
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    finally:
        os.umask(old)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELD = st.sampled_from([*DPP.to_dict(), "unheard"])


@pytest.mark.filterwarnings("ignore:The policy has ")
@given(st.dictionaries(FIELD, JSON, max_size=4))
def test_whatever_a_file_holds_it_is_a_policy_or_a_policy_error(changes: dict[str, Any]) -> None:
    try:
        policy = PruningPolicy.from_dict({**DPP.to_dict(), **changes})
    except PolicyError:
        return
    assert PruningPolicy.from_dict(policy.to_dict()) == policy
