"""Fixtures of the tests of pruning."""

from collections.abc import Iterator

import pytest
import torch

from catp_lightning import PruningPolicy
from catp_lightning.methods import Method
from catp_lightning.methods.selectors import TopK
from tests.support.observing import Notes


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every policy have a scorer that keeps what it is shown."""
    monkeypatch.setattr(PruningPolicy, "method", lambda policy: Method(Notes(), TopK()))


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Compiled code belongs to the process, not to a model: each test begins, and ends, without any."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def what_a_family_lacks(request: pytest.FixtureRequest) -> None:
    """Expect a test to fail where its row says what the family lacks; a reason that no longer holds fails it."""
    row = request.node.callspec.params.get("row")
    reason = row and row.lacks.get(request.node.originalname.removeprefix("test_"))
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
