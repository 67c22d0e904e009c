"""Whatever a policy file, a checkpoint or a half-done calibration holds: it is read exactly, or refused by name."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as tensors_of

from catp_lightning import PolicyError, PrunedModule, PruningError, PruningPolicy, prune
from catp_lightning.calibration.checkpoint import CalibrationCheckpoint, _checksum
from catp_lightning.calibration.fit.sums import PartCounts, TokenCounts
from catp_lightning.calibration.plan import why_not
from catp_lightning.calibration.search.candidates import Candidate
from catp_lightning.callbacks import calibration
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.token_pruning import load_policy
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.models import find_family
from catp_lightning.policy.frozen import DEEPEST
from catp_lightning.pruning.refusals import check_model
from tests.support.fuzzing import Mutator, many
from tests.support.models import greedily, random_blip2, random_inputs
from tests.support.modules import Generating
from tests.support.trainers import loading, trainer

TEXT = st.text(st.characters(), max_size=8)  # halves of characters too


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    inner = lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXT, each, max_size=3)  # noqa: E731
    return st.recursive(leaves, inner, max_leaves=8)


PLAIN = trees(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT)
JUNK = trees(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from([2**70, -(10**400), 1e308, 5e-324, -0.0, b"x", {1}, object])
)  # fmt: skip
KEEP = st.floats(0, 1, exclude_min=True) | st.integers(1, 2**63 - 1)


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a typed field, as JSON has them."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return st.one_of(map(of_type, options))
    if origin is Literal:
        return st.sampled_from(options)
    if origin is tuple:
        return st.lists(of_type(options[0]), max_size=4)
    if hint is int:
        return st.integers(-3, 6) | st.integers()
    return {
        float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2),
        bool: st.booleans(),
        str: st.text(max_size=5),
        type(None): st.none(),
    }[hint]


def arguments(cls: type, junk: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Some of a method's arguments, of the types of its fields; or anything in place of them."""
    hints = get_type_hints(cls)
    each = {part.name: JUNK if junk else of_type(hints[part.name]) for part in fields(cls) if part.init}
    return st.fixed_dictionaries({}, optional=each)


@st.composite
def rules(draw: st.DrawFn, junk: bool, scorers: Sequence[str] = sorted(SCORERS)) -> dict[str, Any]:
    scorer = draw(st.sampled_from(scorers))
    selector = draw(st.none() | st.sampled_from(sorted(SELECTORS)))
    chosen = SELECTORS[selector or SCORERS[scorer].selector]
    return {
        "scorer": scorer,
        "scorer_args": draw(arguments(SCORERS[scorer], junk)),
        "selector": selector,
        "selector_args": draw(arguments(chosen, junk)),
    }


MODEL = random_blip2()
ON_BLIP2 = [name for name in SCORERS if why_not(find_family(MODEL[0]), Candidate(name, name)) is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


def exact(policy: PruningPolicy) -> str:
    """A policy to the last bit: 1 is not 1.0 here, and -0.0 not 0."""
    return json.dumps(policy.to_dict(), sort_keys=True)


@given(rule=rules(junk=False), keep=KEEP, evidence=st.dictionaries(TEXT, PLAIN))
def test_a_policy_of_any_method_and_any_typed_arguments_is_read_back_to_the_last_bit(
    folder: Path, rule: dict[str, Any], keep: float, evidence: dict[str, Any]
) -> None:
    try:
        policy = PruningPolicy(keep=keep, evidence=evidence, **rule)
    except PolicyError:
        return
    same = PruningPolicy.from_dict(policy.to_dict())
    loaded = PruningPolicy.load(policy.save(folder / "policy.json"))
    for other in (same, loaded):
        assert other == policy and exact(other) == exact(policy)
        assert type(other.keep) is type(keep) and other.keep == keep
        assert other.build_scorer() == policy.build_scorer() and other.build_selector() == policy.build_selector()


@given(rule=rules(junk=True), more=st.dictionaries(st.sampled_from(["keep", "positions", "model", "evidence"]), JUNK))
def test_arguments_of_any_kind_make_a_policy_or_a_policy_error(rule: dict[str, Any], more: dict[str, Any]) -> None:
    try:
        policy = PruningPolicy(**{**rule, **more})
    except PolicyError:
        return
    assert exact(PruningPolicy.from_dict(policy.to_dict())) == exact(policy)


@settings(max_examples=60)
@given(
    rule=rules(junk=False, scorers=ON_BLIP2), keep=st.floats(0.01, 1) | st.integers(1, 9) | st.integers(1, 2**63 - 1)
)
def test_what_is_accepted_prunes_or_is_refused_when_the_model_is_known(rule: dict[str, Any], keep: float) -> None:
    model, inputs = MODEL
    try:
        policy = PruningPolicy(keep=keep, **rule)
        with torch.no_grad(), prune(model, policy) as pruning:
            model(**inputs)
    except (PolicyError, PruningError, ValueError):  # of weights that are as many as another model's heads: ValueError
        return
    assert pruning.keep is not None
    least = 0 if policy.scorer == "visual-exit" else 1
    assert (pruning.keep.sum(1) >= least).all() and pruning.keep.shape == (3, 8)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"scorer": "sparsevlm", "scorer_args": {"scale": 10**400}},
            "scale of scorer 'sparsevlm' is 1000.*finite number",
        ),
        ({"selector": "dpp", "selector_args": {"relevance": -(10**400)}}, "relevance of selector 'dpp' is -1000"),
        ({"keep": {"share": 10**400}}, "keep is {'share': 1000"),
        ({"keep": {"tokens": 10**400}}, "keep is a number of 1329 bits"),
        ({"scorer": "random", "scorer_args": {"seed": 2**63}}, "seed is 9223372036854775808; it is .* of 64 bits"),
        ({"scorer": "x" * 10**6}, "There is no scorer 'xxx"),
    ],
)
def test_numbers_beyond_all_floats_and_endless_names_are_refused_in_few_words(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(PolicyError, match=says) as error:
        PruningPolicy.from_dict(values)
    assert len(str(error.value)) < 2000


def test_a_policy_is_not_changed_by_what_is_done_to_the_dictionaries_it_was_made_of() -> None:
    args: dict[str, Any] = {"layers": [0, 1]}
    policy = PruningPolicy(scorer_args=args)
    args["layers"].append("junk")
    assert policy.scorer_args == {"layers": [0, 1]}


def test_numbers_of_numpy_and_tuples_are_kept_as_json_has_them(folder: Path) -> None:
    policy = PruningPolicy(scorer_args={"layers": (0, 1)}, keep=np.float64(0.25))
    assert type(policy.keep) is float and policy.scorer_args == {"layers": [0, 1]}
    assert PruningPolicy.from_dict(policy.to_dict()) == policy
    from catp_lightning.policy.locations import budget_file_name

    assert budget_file_name(np.float64(0.25)) == "keep-0.25.json"


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def test_evidence_is_as_deep_as_can_be_saved_and_read_and_no_deeper(folder: Path) -> None:
    policy = PruningPolicy(evidence={"x": nested(DEEPEST - 2)})
    assert PruningPolicy.load(policy.save(folder / "deep.json")) == policy
    for depth in (DEEPEST, 400, 10_000):
        with pytest.raises(PolicyError, match=r"nested deeper than|holds something JSON cannot"):
            PruningPolicy(evidence={"x": nested(depth)})


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("x" * 5000, "cannot be looked up"),
        ("~nobody-of-that-name/policy.json", "cannot be looked up"),
        ("a\0b", "There is no policy at"),
        ("/dev/null", "There is no policy at"),
        ("\ud800.json", "There is no policy at|cannot be looked up"),
    ],
)
def test_a_path_that_no_file_can_have_is_refused_as_any_other(path: str, says: str) -> None:
    for keep in (None, 0.5):
        with pytest.raises(PolicyError, match=says):
            PruningPolicy.load(path, keep=keep)


def test_a_file_that_was_renamed_to_another_budget_is_refused(folder: Path) -> None:
    PruningPolicy(keep=0.25).save(folder / "renamed" / "keep-0.5.json")
    with pytest.raises(PolicyError, match=r"keep-0\.5\.json is for keep=\{'share': 0\.25\}, not 0\.5"):
        PruningPolicy.load(folder / "renamed", keep=0.5)
    (folder / "renamed" / "keep-0.5.json").write_text("[" * 100_000)
    with pytest.raises(PolicyError, match="cannot be read as a policy"):
        PruningPolicy.load(folder / "renamed", keep=0.5)


@pytest.fixture(scope="module")
def documents(folder: Path) -> list[Any]:
    """Policies as files hold them: one written by hand, one that a real calibration found."""
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(7)
        patch.setattr(calibration, "report", lambda *_: [])
        inputs = random_inputs(8, 16, True, torch.float32)
        batches = [{name: value[start : start + 8] for name, value in inputs.items()} for start in (0, 8)]
        callback = CrossAttentionCalibration(folder / "real.json", keep=3, scorer="cross-attention")
        trainer(callback).predict(Generating(random_blip2()[0], greedily(1)), loading(batches))
    plain = PruningPolicy("catp", {"layers": [0, -1], "head_weights": [[1, -0.5], [0, 2]]}, "dpp", {"relevance": 0.5})
    real = PruningPolicy.load(folder / "real.json")
    assert {"images", "candidates", "retention"} <= real.evidence.keys()
    return [plain.to_dict(), real.to_dict()]


def used(policy: PruningPolicy) -> None:
    """All that is done with a policy before and when a loop starts."""
    assert exact(PruningPolicy.from_dict(policy.to_dict())) == exact(policy)
    policy.build_scorer()
    policy.build_selector()
    load_policy(policy, None)
    check_model(policy, find_family(MODEL[0]))


def fuzz_policies(count: int, documents: list[Any], place: Path, canary: Path) -> None:
    raw = [json.dumps(document, indent=2).encode() for document in documents]
    file = place / "policy.json"

    def each(seed: int) -> bool:
        mutator, which = Mutator(seed, canary), seed % len(documents)
        content = mutator.document(documents[which]) if seed % 3 else mutator.bytes(raw[which])
        file.write_bytes(content)
        try:
            used(PruningPolicy.load(place if seed % 2 else file, keep=(None, 0.5, 3)[seed % 5 % 3]))
        except PolicyError:
            return False
        return True

    taken = many(count, each)
    assert 0.01 * count < taken < 0.7 * count, f"{taken} of {count} were taken: the damage is too weak or too strong"


def fuzz_checkpoints(count: int, documents: list[Any], canary: Path) -> None:
    """What `PrunedModule` keeps in a checkpoint: a dictionary of any Python numbers, NaN among them."""

    def each(seed: int) -> bool:
        try:
            values = json.loads(Mutator(seed, canary).document(documents[seed % 2]))
        except (ValueError, RecursionError):  # no document at all
            return False
        try:
            used(PruningPolicy.from_dict(values))
        except PolicyError:
            return False
        return True

    assert many(count, each) > 0.01 * count


def fuzz_partials(count: int, place: Path, canary: Path) -> None:
    """The file of an interrupted calibration: its tensors, and JSON in their header."""
    made_with = {"keep": ["0.5"], "model": "abc", "method": None}
    file = place / "policy.json.partial-0.safetensors"

    def metrics() -> dict[str, Any]:
        return {"parts": PartCounts(), "tokens": TokenCounts()}

    def write() -> bytes:
        partial, found = CalibrationCheckpoint(file, made_with), metrics()
        partial.begin("first", found)
        for number in range(3):
            found["parts"].update(torch.tensor([0, 1]))
            partial.add((number, number + 5), found)
        partial.finish(3, found)
        return file.read_bytes()

    file.unlink(missing_ok=True)
    content = write()
    assert len(tensors_of(content)) == 3
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]

    def damaged(seed: int) -> bytes:
        mutator = Mutator(seed, canary)
        if seed % 3 == 0:
            return mutator.bytes(content)
        changed = json.loads(json.dumps(header))
        if seed % 3 == 1:  # the JSON that stands in the header as text
            part = ("settings", "stages")[seed % 2]
            text = mutator.document(json.loads(header["__metadata__"][part])).decode("utf-8", "replace")
            told = {**changed["__metadata__"], part: text}
            del told["checksum"]  # and made anew, or the text would not be looked at
            changed["__metadata__"] = {**told, "checksum": _checksum(tensors_of(content), told)}
            found = json.dumps(changed).encode()
        else:
            found = mutator.document(changed)
        return len(found).to_bytes(8, "little") + found + rest

    def each(seed: int) -> bool:
        file.write_bytes(damaged(seed))
        try:
            partial = CalibrationCheckpoint(file, made_with)
            partial.begin("first", metrics())
            partial.has(0, (0, 5))
        except PolicyError:
            return False
        return True

    assert many(count, each) < 0.9 * count


def test_damaged_policies_partial_files_and_checkpoints_are_read_or_refused(
    documents: list[Any], tmp_path: Path, canary: Path
) -> None:
    fuzz_policies(500, documents, tmp_path, canary)
    fuzz_checkpoints(150, documents, canary)
    fuzz_partials(150, tmp_path, canary)


@pytest.mark.slow
def test_fifty_thousand_damaged_policies_partial_files_and_checkpoints_are_read_or_refused(
    documents: list[Any], tmp_path: Path, canary: Path
) -> None:
    fuzz_policies(36_000, documents, tmp_path, canary)
    fuzz_checkpoints(8_000, documents, canary)
    fuzz_partials(6_000, tmp_path, canary)


def test_a_checkpoint_whose_policy_is_damaged_or_that_holds_code_is_refused(
    documents: list[Any], tmp_path: Path, canary: Path
) -> None:
    file, module = tmp_path / "last.ckpt", Generating(random_blip2()[0])
    damaged = {**documents[0], "keep": {"share": 1e400}}
    torch.save({"state_dict": module.state_dict(), "catp_policy": damaged}, file)
    with pytest.raises(PolicyError, match=r"holds something JSON cannot|keep is"):
        PrunedModule.load_from_checkpoint(file, inner=module)
    for content in (Mutator(0, canary)._other[0], Mutator(0, canary)._other[2]):
        file.write_bytes(content)
        with pytest.raises(pickle.UnpicklingError):
            PrunedModule.load_from_checkpoint(file, inner=module)
