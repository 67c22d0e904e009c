"""Nothing of ours depends on torch's default dtype or default device, which belong to the whole process."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import catp_lightning
from catp_lightning import PolicyError, PruningError, PruningPolicy
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.scorers.catp import CATP
from catp_lightning.methods.scorers.controls import Stride
from catp_lightning.metrics import Agreement, TokensKept, VQAAccuracy
from catp_lightning.pruning.pruner import applied
from tests.support.calibrations import calibrate, data
from tests.support.families import BY_NAME
from tests.support.modules import Generating
from tests.support.small_calibrations import QUICKEST

DEFAULTS: list[torch.dtype | str] = [torch.float64, torch.bfloat16, "meta"]
every_default = pytest.mark.parametrize("default", DEFAULTS, ids=str)
MODELS: list[tuple[str, torch.dtype | str]] = [
    *((name, torch.bfloat16) for name in ("Llava", "Blip2-OPT", "Blip2-T5", "Mllama", "InternVL")),
    ("Llava", torch.float64),
    *((name, "meta") for name in ("Llava", "Blip2-T5", "Mllama")),
]


@contextmanager
def defaults(default: torch.dtype | str) -> Iterator[None]:
    if isinstance(default, str):
        with torch.device(default):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def kept_by(name: str, scorer: str, default: torch.dtype | str | None) -> list[Tensor] | None:
    """What a scorer keeps, its scores and tokens a layer; None: it does not run on the model."""
    row = BY_NAME[name]
    model, inputs = row.model(torch.float32), row.inputs(dtype=torch.float32)
    forward = row.oracle.forward_inputs(inputs)
    try:
        with torch.no_grad(), applied(model, PruningPolicy(scorer, keep=4)) as pruner, given(pruner, default):
            model(**forward)
    except (PruningError, PolicyError):
        return None
    pruning = pruner.record
    return [pruning.keep, pruning.last.tokens_per_layer, *([] if pruning.scores is None else [pruning.scores])]


@contextmanager
def given(pruning: Any, default: torch.dtype | str | None) -> Iterator[None]:
    """Under another default dtype a whole call runs; under another device only the choice: transformers makes tensors
    on the default device itself."""
    if default is None:
        yield
    elif isinstance(default, torch.dtype):
        with defaults(default):
            yield
    else:
        choose = pruning._select

        def chosen(prompt: Any) -> Any:
            with defaults(default):
                return choose(prompt)

        pruning._select = chosen
        yield
        del pruning._select


@cache
def usual(name: str, scorer: str) -> list[Tensor] | None:
    return kept_by(name, scorer, None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "default"), MODELS)
def test_every_scorer_and_selector_decides_alike(name: str, default: torch.dtype | str) -> None:
    ran = 0
    for scorer in SCORERS:
        expected = usual(name, scorer)
        if expected is None:
            continue
        found = kept_by(name, scorer, default)
        assert found is not None, scorer
        ran += 1
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and one.device == other.device, scorer
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)
        assert torch.equal(found[0], expected[0]), scorer
    assert ran >= 3


@every_default
def test_stride_has_a_rank_of_its_own_for_each_of_576_tokens(default: torch.dtype | str) -> None:
    images = torch.tensor([3])
    valid = torch.ones(1, 576, dtype=torch.bool)
    with defaults(default):
        scores = Stride().score(Observation(valid, {}, {Signal.IMAGE_HASH: images}))
    assert scores.device.type == "cpu" and len(scores.unique()) == 576


@every_default
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fitted_weights_are_used_in_the_votes_own_precision(default: torch.dtype | str, dtype: torch.dtype) -> None:
    scorer = CATP(head_weights=((0.123457, 1.0), (0.765433, -0.333333)))
    with defaults(default):
        weights = scorer.weights(torch.ones(1, 2, 2, 3, dtype=dtype, device="cpu"))
    assert weights is not None
    assert torch.equal(weights, torch.tensor(scorer.head_weights, dtype=dtype))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_a_calibration_finds_the_same_policy(default: torch.dtype, tmp_path: Path) -> None:
    module, batches = Generating(), data(24, 12)
    expected = calibrate(module, batches, tmp_path / "expected.json", calibration=QUICKEST).policies[0]
    with defaults(default):
        found = calibrate(module, batches, tmp_path / "found.json", calibration=QUICKEST).policies[0]
    assert (found.scorer, found.scorer_args, found.selector) == (
        expected.scorer,
        expected.scorer_args,
        expected.selector,
    )
    for one, other in zip(found.evidence["candidates"], expected.evidence["candidates"], strict=True):
        for figure in ("agreement", "divergence", "samples"):
            assert one["choose"][figure] == pytest.approx(other["choose"][figure], abs=1e-9), one["name"]


@every_default
def test_metrics_count_alike(default: torch.dtype | str) -> None:
    with defaults(default):
        accuracy, agreement, tokens = VQAAccuracy(), Agreement(), TokensKept()
    for metric in (accuracy, agreement, tokens):
        for state in metric.metric_state.values():
            assert state.device.type == "cpu" and state.dtype == torch.int64


FACTORIES = {"tensor", "zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn", "arange", "randperm"}
OF_INTEGERS = {"arange", "randperm"}


def test_every_tensor_that_is_made_names_its_dtype_and_its_device() -> None:
    root, wrong = Path(catp_lightning.__file__).parent, []
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in FACTORIES:
                wanted = {"device"} if node.func.attr in OF_INTEGERS else {"device", "dtype"}
                if missing := wanted - {keyword.arg for keyword in node.keywords}:
                    wrong.append(f"{file.relative_to(root)}:{node.lineno} torch.{node.func.attr} without {missing}")
    assert not wrong
