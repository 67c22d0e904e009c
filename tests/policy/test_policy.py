"""A policy is saved whole, loads as it was, and refuses with the value and what is allowed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catp_lightning import PolicyError, PruningPolicy
from catp_lightning.methods.scorers import SCORERS
from tests.support.policies import DPP


@pytest.mark.parametrize("keep", [1.0, 1, 0.25, 16])
def test_a_policy_loads_as_it_was_saved(tmp_path: Path, keep: float) -> None:
    policy = DPP.with_keep(keep)
    assert policy.save(tmp_path / "deep" / "policy.json") == tmp_path / "deep" / "policy.json"
    loaded = PruningPolicy.load(tmp_path / "deep" / "policy.json")
    assert loaded == policy and type(loaded.keep) is type(keep)
    written = json.loads((tmp_path / "deep" / "policy.json").read_text())["stages"][0]["keep"]
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
        ({"scorer_args": {"head_weights": [[float("nan")]]}}, "scorer_args holds a value that JSON cannot hold"),
        (
            {"scorer_args": {"image_weight": "x"}},
            "image_weight of scorer 'catp' is 'x'; allowed is 'none' or 'received'",
        ),
        ({"scorer_args": [1]}, "scorer_args must be a dictionary"),
        ({"selector_args": {"relevance": 1.0}}, "selector 'top-k' has no argument 'relevance'; it takes per"),
        ({"selector": "dpp", "selector_args": {"relevance": "high"}}, "relevance of selector 'dpp' is 'high'"),
        ({"model": "blip-2"}, "model must be a dictionary"),
        ({"evidence": {"x": float("inf")}}, "evidence holds a value that JSON cannot hold"),
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
        pytest.warns(UserWarning, match=r"has format_version 7, .* reads up to 2: .* Update catp-lightning"),
    ):
        loaded = PruningPolicy.load(file)
    assert loaded == DPP, "what is saved again is of this version"
    with pytest.raises(PolicyError, match=r"format_version is 3; this version of catp-lightning has 2"):
        PruningPolicy(format_version=3)


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELD = st.sampled_from([*DPP.to_dict(), "unheard"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The policy has ")
@given(st.dictionaries(FIELD, JSON, max_size=4))
def test_whatever_a_file_holds_it_is_a_policy_or_a_policy_error(changes: dict[str, Any]) -> None:
    try:
        policy = PruningPolicy.from_dict({**DPP.to_dict(), **changes})
    except PolicyError:
        return
    assert PruningPolicy.from_dict(policy.to_dict()) == policy


@pytest.mark.parametrize("evidence", [{}, {"text": "x" * 3 * 2**20, "many": [0] * 2**17}])
def test_the_digest_is_that_of_the_file_that_is_saved(evidence: dict[str, Any], tmp_path: Path) -> None:
    policy = PruningPolicy("catp", keep=0.5, evidence=evidence)
    assert policy.digest == hashlib.sha256(policy.save(tmp_path / "policy.json").read_bytes()).hexdigest()
    assert policy.digest != policy.with_keep(0.25).digest
