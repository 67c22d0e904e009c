"""Policies on the Hugging Face hub: uploaded with a card, found by their model, loaded again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.policy.hub import card
from tests.support.hub import Hub, local_hub
from tests.support.policies import DPP

GOLDEN = Path(__file__).parents[1] / "golden" / "digits_llava-all-budgets-0.json"
LLAVA = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with local_hub(tmp_path / "cache", monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def calibrated() -> PruningPolicy:
    """A policy that a calibration made, as if of a model of the hub."""
    values: dict[str, Any] = json.loads(GOLDEN.read_text())[0]
    return PruningPolicy.from_dict({**values, "model": {**values["model"], "name": LLAVA}})


def metadata(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    return dict(yaml.safe_load(front))


def test_a_policy_that_is_uploaded_is_loaded_again_with_its_evidence(hub: Hub, calibrated: PruningPolicy) -> None:
    address = calibrated.push_to_hub("me/llava-catp-25", license="apache-2.0")
    assert "/me/llava-catp-25/commit/" in address
    assert set(hub.files["me/llava-catp-25"]["main"]) == {"policy.json", "README.md"}
    assert PruningPolicy.from_pretrained("me/llava-catp-25") == calibrated
    assert PruningPolicy.load("hf://me/llava-catp-25@main", keep=calibrated.keep) == calibrated
    with pytest.raises(PolicyError, match="not 3"):
        PruningPolicy.from_pretrained("me/llava-catp-25", keep=3)


def test_a_card_says_what_it_is_for_and_what_was_measured(hub: Hub, calibrated: PruningPolicy) -> None:
    calibrated.push_to_hub("me/llava-catp-25", license="apache-2.0")
    text = hub.files["me/llava-catp-25"]["main"]["README.md"].decode()
    assert metadata(text) == {
        "base_model": LLAVA,
        "library_name": "catp-lightning",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
        "tags": ["visual-token-pruning", "vision-language-model", "fastervlm"],
    }
    point = calibrated.evidence["retention"][0]
    low, high = point["interval"]
    assert f"| {point['keep']} ({point['tokens']} tokens) | {point['chosen']} | " in text
    assert f"{point['agreement']:.3f} ({low:.3f} to {high:.3f})" in text
    assert "divprune; level" in text, "what was level with a control is called so"
    assert (
        'PruningPolicy.from_pretrained("me/llava-catp-25")' in text and 'TokenPruning("hf://me/llava-catp-25")' in text
    )
    assert "Digest of the calibration images: `" in text
    other = PruningPolicy.from_dict({**calibrated.to_dict(), "evidence": {**calibrated.evidence, "images": {}}})
    assert "Digest" not in card(other, "me/policy", None)


def test_revisions_and_pull_requests(hub: Hub) -> None:
    DPP.with_keep(1).push_to_hub("me/policy", private=True)
    DPP.with_keep(2).push_to_hub("me/policy", revision="v2")
    assert "/discussions/1" in DPP.with_keep(3).push_to_hub("policy", create_pr=True)
    revisions = (None, "v2", "refs/pr/1")
    assert [PruningPolicy.from_pretrained("me/policy", name).keep for name in revisions] == [1, 2, 3]
    assert hub.private == {"me/policy": True}


def test_what_the_hub_refuses_is_said_and_changes_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PolicyError, match=r"could not be uploaded to 'me/policy' .*401.*Check the name, the network"):
        DPP.push_to_hub("me/policy", token="hf_wrong")
    with pytest.raises(PolicyError, match=r"could not be uploaded to 'a/b/c'"):
        DPP.push_to_hub("a/b/c")
    assert not hub.files
    with pytest.raises(PolicyError, match="hf://me/policy could not be fetched"):
        PruningPolicy.from_pretrained("me/policy")


def test_a_folder_is_saved_and_loaded_without_the_hub(tmp_path: Path) -> None:
    folder = DPP.save_pretrained(tmp_path / "catp-25", license="mit")
    assert {file.name for file in folder.iterdir()} == {"policy.json", "README.md"}
    assert PruningPolicy.from_pretrained(folder) == DPP
    with pytest.raises(PolicyError, match=r"revision is 'v1' and .* is a folder"):
        PruningPolicy.from_pretrained(folder, "v1")
    text = (folder / "README.md").read_text()
    assert text.partition("---\n\n")[2].startswith("# catp-25\n") and "Nothing: this policy was written by hand" in text
    assert "base_model" not in metadata(text), "a policy for any model is of none"


def test_foreign_names_in_a_card_are_text(calibrated: PruningPolicy) -> None:
    values = calibrated.to_dict()
    values["evidence"]["retention"][0]["chosen"] = "<script>x</script> | [a](http://b)\n# big"
    values["model"]["name"] = "a: b\n---\n/\x1b[2J"
    text = card(PruningPolicy.from_dict(values), "me/policy", None)
    assert "<script>" not in text and "](http:" not in text and "\x1b" not in text and "\n# big" not in text
    assert set(metadata(text)) <= {"base_model", "library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize("damage", [{"retention": [{"keep": 1}]}, {"retention": 5}, {"retention": [5], "samples": []}])
def test_evidence_of_another_form_is_said_to_be_so(damage: dict[str, Any]) -> None:
    policy = PruningPolicy("stride", evidence=damage)
    assert "is not of the form" in card(policy, "me/policy", None)
