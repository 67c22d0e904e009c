"""Whatever a policy file, a checkpoint or a half-done calibration holds: it is read, or refused by name."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as tensors_of

from catp_lightning import PolicyError, PrunedModule, PruningPolicy
from catp_lightning.calibration.checkpoint import CalibrationCheckpoint, _checksum
from catp_lightning.calibration.fit.sums import PartCounts, TokenCounts
from catp_lightning.callbacks import calibration
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.token_pruning import load_policy
from catp_lightning.models import find_family
from catp_lightning.pruning.refusals import check_model
from tests.support.fuzzing import Mutator, many
from tests.support.models import greedily, random_blip2, random_inputs
from tests.support.modules import Generating
from tests.support.policy_strategies import MODEL, exact
from tests.support.trainers import loading, trainer


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
    assert len(tensors_of(content)) == 4
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


@pytest.mark.slow
def test_damaged_policies_partial_files_and_checkpoints_are_read_or_refused(
    documents: list[Any], tmp_path: Path, canary: Path
) -> None:
    fuzz_policies(250, documents, tmp_path, canary)
    fuzz_checkpoints(100, documents, canary)
    fuzz_partials(100, tmp_path, canary)


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
    damaged = {**documents[0], "stages": [{**documents[0]["stages"][0], "keep": {"share": 1e400}}]}
    torch.save({"state_dict": module.state_dict(), "catp_policy": damaged}, file)
    with pytest.raises(PolicyError, match=r"holds a value that JSON cannot hold|keep is"):
        PrunedModule.load_from_checkpoint(file, inner=module)
    for content in (Mutator(0, canary)._other[0], Mutator(0, canary)._other[2]):
        file.write_bytes(content)
        with pytest.raises(pickle.UnpicklingError):
            PrunedModule.load_from_checkpoint(file, inner=module)
