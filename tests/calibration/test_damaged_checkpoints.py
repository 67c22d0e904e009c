"""A damaged partial file is refused, and nothing in it is run."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from catp_lightning import PolicyError
from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from tests.support.fuzzing import Runs
from tests.support.interrupted_calibrations import PARTIAL
from tests.support.partial_files import metrics, signed, update

pytestmark = pytest.mark.usefixtures("small_calibrations")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "text": lambda _: b"not a file of tensors",
    "a pickle": lambda _: pickle.dumps(Runs(Path("unpickled"))),
    "other tensors": lambda _: save({"weight": torch.ones(2)}),
    "other metadata": lambda _: signed({"data": torch.ones(2)}, settings="[1]", stages="{"),
    "one number for a batch": lambda _: signed({"data": torch.ones(2)}, settings="{}", stages="[]"),
    "sums of no stage": lambda _: signed(
        {"data": torch.ones(0, 2), "3/probes/gram": torch.ones(2)}, settings="{}", stages="[]"
    ),
    "no checksum": lambda _: save({"data": torch.ones(0, 2)}, {"settings": "{}", "stages": "[]"}),
    "a checksum of something else": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_nothing_in_it_is_run(
    path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    file = path.parent / PARTIAL
    damaged = DAMAGE[damage](file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(
        PolicyError, match=f"{PARTIAL} cannot be read as part of a calibration .*Delete it to start anew"
    ):
        CalibrationCheckpoint(file, {})
    assert file.read_bytes() == damaged
    assert list(path.parent.iterdir()) == [file]


def test_every_bit_of_a_partial_file_is_checked(tmp_path: Path) -> None:
    """Of sums, fingerprints, settings, names, shapes and the checksum itself; and numbers that were put in by hand."""
    file, found = tmp_path / PARTIAL, metrics()
    partial = CalibrationCheckpoint(file, {"keep": ["0.5"]})
    partial.begin("first", found)
    update(found, 0)
    partial.add((1, 2), found)
    partial.finish(1, found)
    whole = file.read_bytes()
    CalibrationCheckpoint(file, {"keep": ["0.5"]})
    length, chooser = 8 + int.from_bytes(whole[:8], "little"), random.Random(0)
    bits = [*(8 * byte + chooser.randrange(8) for byte in range(0, len(whole), 3)), 8 * length + 7, 8 * len(whole) - 1]
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(PolicyError, match=r"cannot be read as part of a calibration .*Delete it to start anew"):
            CalibrationCheckpoint(file, {"keep": ["0.5"]})
    sums = load(whole)
    other = {**sums, "0/parts/counts": sums["0/parts/counts"] + 1}
    file.write_bytes(save(other, json.loads(whole[8:length])["__metadata__"]))
    with pytest.raises(PolicyError, match="its checksum is another: the file was damaged or changed"):
        CalibrationCheckpoint(file, {"keep": ["0.5"]})


def test_a_partial_file_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / PARTIAL)
    with pytest.raises(PolicyError, match=r"it is a named pipe, not a regular file.*Delete it"):
        CalibrationCheckpoint(tmp_path / PARTIAL, {})
