"""Groups of questions are read from a field of whatever a user's batch is."""

import re
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from catp_lightning import PolicyError, PruningError
from catp_lightning.calibration.replay.groups import Groups


@dataclass
class Batch:
    kind: Any


BATCHES: dict[str, Any] = {
    "dictionary": lambda kind: {"kind": kind},
    "encoding": lambda kind: BatchEncoding({"kind": kind}),
    "dataclass": Batch,
    "named tuple": namedtuple("Tuple", ["kind"]),
    "object": lambda kind: SimpleNamespace(kind=kind),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_field_is_read_of_any_batch(kind: str) -> None:
    found = Groups.of(BATCHES[kind](["count", "colour", "count"]), "kind")
    assert [found.names[key] for key in found.keys.tolist()] == ["count", "colour", "count"]
    assert found.keys.dtype == torch.int64 and found.keys[0] == found.keys[2] != found.keys[1]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (("a", "b"), ["a", "b"]),
        ([3, -1], ["3", "-1"]),
        ([True, False], ["True", "False"]),
        (torch.tensor([3, 1, 3]), ["3", "1", "3"]),
        (torch.tensor([True, False]), ["True", "False"]),
        ([torch.tensor(2), torch.tensor(5)], ["2", "5"]),
        (np.array(["x", "y"]), ["x", "y"]),
        (np.array([4, 5]), ["4", "5"]),
        ([np.int64(4)], ["4"]),
        ("one sample", ["one sample"]),
        (7, ["7"]),
        (torch.tensor(7), ["7"]),
        ([], []),
    ],
)
def test_texts_whole_numbers_and_booleans_name_groups(values: Any, names: list[str]) -> None:
    found = Groups.of({"kind": values}, "kind")
    assert [found.names[key] for key in found.keys.tolist()] == names


@pytest.mark.parametrize(
    "values", [None, 1.5, [0.5], torch.tensor([0.5]), [["a"]], torch.ones(2, 2).long(), {"a": 1}, [None]]
)
def test_other_values_are_refused(values: Any) -> None:
    with pytest.raises(PolicyError, match=r"group_by is 'kind', and this field of a batch holds .* a text, a whole"):
        Groups.of({"kind": values}, "kind")


def test_a_field_that_is_not_there_is_refused_with_those_that_are() -> None:
    said = (
        "group_by is 'kinds', and a batch (dict) has no such field: it has 'kind', 'pixel_values'. Did you mean 'kind'?"
    )
    with pytest.raises(PolicyError, match=re.escape(said)):
        Groups.of({"kind": [1], "pixel_values": torch.zeros(1)}, "kinds")
    with pytest.raises(PolicyError, match=re.escape("a batch (list) has no such field. Name one")):
        Groups.of([torch.zeros(1)], "kind")


def test_groups_go_to_the_calls_of_a_step_in_order() -> None:
    groups = Groups.of({"kind": [1, 2, 3, 4, 5]}, "kind")
    found = groups.split([2, 3])
    assert [[one.names[key] for key in one.keys.tolist()] for one in found] == [["1", "2"], ["3", "4", "5"]]
    assert torch.equal(groups.where(torch.tensor([0, 1, 0, 0, 1]).bool()).keys, groups.keys[[1, 4]])
    with pytest.raises(PruningError, match=r"holds 5 values, but the step asked the model about 4 samples, in 2 calls"):
        groups.split([2, 2])
