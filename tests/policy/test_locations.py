"""Where policies are looked for: files, folders of several budgets, the hub, artifacts."""

import warnings
from pathlib import Path

import pytest

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.policy import locations
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.utils.files import write_text
from tests.support.policies import DPP


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
    with pytest.raises(PolicyError, match=r"neither policy\.json nor one of a budget"):
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
