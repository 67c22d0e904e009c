"""What another package's scorer returns is checked where it enters: a fault has the scorer's name."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.methods.observation import Observation
from catp_lightning.methods.registry import Registry
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.scorers.controls import Stride
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors import SELECTORS, Selector
from catp_lightning.methods.selectors.top_k import TopK
from tests.support.models import random_blip2


class Foreign(Stride):
    """As another package brings it; what it returns is set by each test."""

    returned: Callable[[Tensor], Any]

    def score(self, seen: Observation) -> Tensor:
        return type(self).returned(super().score(seen))


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> type[Foreign]:
    monkeypatch.setitem(SCORERS._loaded, "foreign", Foreign)
    monkeypatch.setitem(SCORERS._others, "foreign", [])
    return Foreign


def kept(scorer: str) -> Tensor:
    model, inputs = random_blip2()
    with torch.no_grad(), prune(model, PruningPolicy(scorer, keep=3)) as pruning:
        model(**inputs)
    assert pruning.keep is not None and pruning.scores is not None and not pruning.scores.requires_grad
    return pruning.keep


def fails(scores: Tensor) -> Tensor:
    raise ZeroDivisionError("by hand")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda scores: scores[0], r"gives one of shape \(8,\) on cpu; scores are .* of shape \(3, 8\) on cpu"),
        (lambda scores: scores[:, :4], r"gives one of shape \(3, 4\)"),
        (lambda scores: scores[..., None], r"gives one of shape \(3, 8, 1\)"),
        (lambda scores: scores.sum(), r"gives one of shape \(\)"),
        (lambda scores: scores.long(), r"gives one of torch.int64"),
        (lambda scores: scores > 0, r"gives one of torch.bool"),
        (lambda scores: scores + 0j, r"gives one of torch.complex64"),
        (lambda scores: scores.to("meta"), r"gives one of shape \(3, 8\) on meta"),
        (lambda scores: scores.to_sparse(), r"gives one of torch.float32, torch.sparse_coo"),
        (lambda scores: scores.tolist(), "gives a list"),
        (lambda scores: None, "gives a NoneType"),
        (fails, "failed on 3 images with 8 visual tokens: ZeroDivisionError: by hand"),
    ],
)
def test_what_are_no_scores_is_refused_by_the_scorers_name(
    foreign: type[Foreign], returned: Callable[[Tensor], Any], says: str
) -> None:
    foreign.returned = staticmethod(returned)
    named = rf"The scorer 'foreign' \({re.escape(__name__)}\) "
    with pytest.raises(PruningError, match=f"{named}.*{says}.*Repair or uninstall the package"):
        kept("foreign")
    assert kept("stride").sum() == 9, "the model is what it was, and other scorers go on"


@pytest.mark.slow
def test_gradients_half_precision_and_what_is_no_number_are_no_fault(foreign: type[Foreign]) -> None:
    expected = kept("stride")
    for returned in (Tensor.requires_grad_, Tensor.half, Tensor.double):
        foreign.returned = staticmethod(returned)
        assert kept("foreign").equal(expected)
    foreign.returned = staticmethod(lambda scores: scores * torch.nan)
    assert kept("foreign")[:, :3].all(), "of equals the first stay"


def test_out_of_memory_is_told_as_such(foreign: type[Foreign]) -> None:
    def full(scores: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    foreign.returned = staticmethod(full)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        kept("foreign")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda keep: keep.long(), r"gives torch.int64 of shape \(3, 8\)"),
        (lambda keep: keep[:, :4], r"gives torch.bool of shape \(3, 4\)"),
        (lambda keep: keep.nonzero(), r"gives torch.int64 of shape \(9, 2\)"),
    ],
)
def test_what_a_selector_returns_is_checked_too(
    monkeypatch: pytest.MonkeyPatch, returned: Callable[[Tensor], Any], says: str
) -> None:
    class Odd(TopK):
        def select(self, *args: Any) -> Selection:
            return Selection(returned(super().select(*args).keep))

    monkeypatch.setitem(SELECTORS._own, "odd", Odd)
    model, inputs = random_blip2()
    for scorer, says_ in (("stride", says), ("fastv", r"gives (torch\.int64|torch\.bool) of shape")):
        policy = PruningPolicy(scorer, {"layer": 1} if scorer == "fastv" else {}, selector="odd", keep=3)
        with pytest.raises(PruningError, match=f"The selector Odd {says_}"), torch.no_grad(), prune(model, policy):
            model(**inputs)


@pytest.mark.parametrize(("scorer", "args"), [("stride", {}), ("fastv", {"layer": 1})])
def test_a_selector_of_another_package_that_fails_is_named_before_the_decoder_and_inside(
    monkeypatch: pytest.MonkeyPatch, scorer: str, args: dict[str, Any]
) -> None:
    class Failing(TopK):
        def select(self, *args: Any) -> Selection:
            raise IndexError("made by hand")

    model, inputs = random_blip2()
    monkeypatch.setattr(
        "catp_lightning.policy.building.SELECTORS", Registry("selector", Selector, {"failing": Failing})
    )
    policy = PruningPolicy(scorer, args, selector="failing", keep=3)
    says = r"selector 'Failing|.*Failing' .* failed on \[3, 8\] tokens: IndexError: made by hand"
    with pytest.raises(PruningError, match=says), torch.no_grad(), prune(model, policy):
        model(**inputs)
