"""Triton kernels choose as the loops that they stand for do: on a GPU where there is one, else by its interpreter."""

import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from catp_lightning.methods.selectors import SELECTORS, Selector
from catp_lightning.methods.selectors.determinant import RIDGE, _steps, exact_similarity, greedy_ranks
from catp_lightning.methods.selectors.dpp import DPP
from catp_lightning.methods.selectors.fused import MOST_TOKENS, Fused, for_kernels
from tests.support.launches import launches, on_kernels, read_before
from tests.support.slow_determinant import shortfall
from tests.support.waiting import as_on_gpu

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: torch has it for CUDA")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT: dict[str, Selector] = {  # what is compared is rounded or whole: one choice, whatever the order of sums
    "max-min": SELECTORS["max-min"](),
    "prune-similar": SELECTORS["prune-similar"](),
    "prune-similar, none by score": SELECTORS["prune-similar"](important=0.0),  # type: ignore[call-arg]
    "prune-similar, all by score": SELECTORS["prune-similar"](important=1.0),  # type: ignore[call-arg]
    "facility-location": SELECTORS["facility-location"](),
    "facility-location, squared": SELECTORS["facility-location"](distance="squared"),  # type: ignore[call-arg]
    "recycle": SELECTORS["recycle"](),
    "context-merge": SELECTORS["context-merge"](),
}
ALL: dict[str, Selector] = {
    **EXACT,
    "dpp": DPP(similarity="outputs"),
    "conditional-dpp": SELECTORS["conditional-dpp"](),
}
AT_MOST = 40  # kernels a choice


def batch(kind: str, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [4, T], visual [4, T] and vectors [4, T, 24]; of the four rows one lacks tokens and one has none."""
    generator = torch.Generator().manual_seed(seed)
    vectors, scores = torch.randn(4, tokens, 24, generator=generator), torch.rand(4, tokens, generator=generator)
    if kind == "twins":
        vectors = vectors[:, torch.randint(0, tokens, (tokens,), generator=generator)]
        scores = (scores * 4).round()
    if kind == "alike":
        vectors, scores = torch.ones_like(vectors), torch.zeros_like(scores)
    if kind == "nan":
        gone = torch.rand(4, tokens, 1, generator=generator) < torch.tensor([0.2, 1.0, 0.2, 0.2])[:, None, None]
        vectors, scores[0, ::5] = vectors.masked_fill(gone, torch.nan), torch.nan
    visual = torch.rand(4, tokens, generator=generator) < torch.tensor([[1.0], [1.0], [0.6], [0.0]])
    return scores.to(DEVICE), visual.to(DEVICE), vectors.to(DEVICE)


# Products of matrices can differ for twins by rounding: a DPP of them is tested below, on whole numbers.
SIZES = [*((name, "any", 37) for name in ALL), *((name, "twins", 37) for name in EXACT)]
SIZES += [(name, kind, tokens) for name in ALL for kind, tokens in (("nan", 21), ("alike", 9), ("any", 1))]


@needs_triton
@pytest.mark.parametrize(("name", "kind", "tokens"), SIZES)
def test_kernels_choose_what_the_loops_choose(name: str, kind: str, tokens: int) -> None:
    for seed, share in ((0, 0.1), (1, 0.5), (2, 1.0)):
        scores, visual, vectors = batch(kind, tokens, seed)
        counts = (visual.sum(1) * share).ceil().long()
        with as_on_gpu():
            loop = ALL[name].select(scores, visual, counts, vectors)
        with on_kernels(), warnings.catch_warnings():
            warnings.filterwarnings("error", "The kernel")
            kernel = ALL[name].select(scores, visual, counts, vectors)
        assert torch.equal(kernel.keep, loop.keep) and torch.equal(kernel.keep.sum(1), counts)
        if loop.destination is not None:
            assert kernel.destination is not None and torch.equal(kernel.destination, loop.destination)


@needs_triton
@pytest.mark.parametrize("name", ["max-min", "facility-location"])
def test_kernels_take_more_steps_than_there_are_tokens(name: str) -> None:
    scores, visual, vectors = batch("nan", 11, 4)
    with as_on_gpu():
        loop = ALL[name].ranks(scores, visual, 15, vectors)
    with on_kernels():
        assert torch.equal(ALL[name].ranks(scores, visual, 15, vectors), loop)
    assert (loop[0] < 11).all() and (loop[3] == 15).all()


@needs_triton
@pytest.mark.parametrize(("tokens", "steps", "seed"), [(1, 1, 0), (2, 5, 1), (37, 30, 2), (16, 16, 3), (5, 0, 4)])
def test_the_kernel_of_a_dpp_adds_tokens_in_the_order_of_the_loop(tokens: int, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-9, 10, (3, tokens, 48), generator=generator).double()
    whole = whole[:, torch.randint(0, tokens, (tokens,), generator=generator)]  # twins, whose products are equal
    kernel = (whole @ whole.mT).to(DEVICE)
    visual = (torch.rand(3, tokens, generator=generator) < torch.tensor([[1.0], [0.6], [0.0]])).to(DEVICE)
    with as_on_gpu():
        loop = greedy_ranks(kernel, visual, steps)
    with on_kernels():
        assert torch.equal(greedy_ranks(kernel, visual, steps), loop)


@needs_triton
def test_beyond_the_rank_of_a_kernel_each_token_still_has_the_largest_gain() -> None:
    vectors = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    visual, kernel = torch.ones(1, 40, dtype=torch.bool, device=DEVICE), exact_similarity(vectors)
    with on_kernels():
        ranks = greedy_ranks(kernel, visual, 20)
    order = ranks[0].argsort()[:20].cpu()
    assert torch.equal(ranks[0].cpu()[order], torch.arange(20)) and shortfall(kernel[0].cpu(), order) < 1e-9


@needs_triton
def test_rounding_errors_of_a_large_kernel_do_not_grow_beyond_its_rank() -> None:
    kernel = exact_similarity(torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)) * 1e12
    gain, closed = kernel.diagonal(dim1=1, dim2=2) + RIDGE, torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    with on_kernels():
        chosen, gains, factors = _steps(kernel, gain, closed, 40)
    assert chosen.unique().numel() == 40 and gains.min() >= RIDGE
    torch.testing.assert_close(factors.mT @ factors, kernel, rtol=0, atol=1.0)  # of 1e12


@pytest.mark.parametrize("tokens", [48, pytest.param(144, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_a_choice_is_at_most_forty_kernels(name: str, tokens: int) -> None:
    if name != "context-merge":
        pytest.importorskip("triton", reason="Triton is not installed: torch has it for CUDA")
    if DEVICE == "cuda":
        pytest.skip("counted by the interpreter; on a GPU benchmarks.launches counts")
    generator = torch.Generator().manual_seed(0)
    vectors, scores = torch.randn(2, tokens, 24, generator=generator), torch.rand(2, tokens, generator=generator)
    visual = read_before(torch.ones(2, tokens, dtype=torch.bool))
    counts = read_before(torch.full((2,), tokens // 4))
    with launches() as found, on_kernels():
        ALL[name].select(scores, visual, counts, vectors)
    assert 0 < found.total <= AT_MOST, found.kinds
    assert found.kinds["triton"] == {"context-merge": 0, "recycle": 4}.get(name, 1)


def test_a_loop_is_many_kernels_and_they_are_counted() -> None:
    scores, visual, vectors = torch.rand(1, 48), torch.ones(1, 48, dtype=torch.bool), torch.rand(1, 48, 8)
    with launches() as found:
        ALL["max-min"].select(scores, visual, torch.tensor([20]), vectors)
    assert found.kinds["argmin"] == 20 and found.total > 10 * 20


def test_a_kernel_that_does_not_run_is_replaced_by_its_loop_with_one_warning() -> None:
    asked: list[int] = []

    def loop(like: Tensor, added: int) -> Tensor:
        asked.append(added)
        return like + added

    choose, like = Fused(loop, "no_such_kernel", {}), torch.zeros(1, 3)
    assert not for_kernels(like) and choose(like, 1).sum() == 3
    with on_kernels():
        with pytest.warns(UserWarning, match=r"The kernel of no_such_kernel does not run here \(ModuleNotFoundError"):
            assert choose(like, 2).sum() == 6
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(like, 3).sum() == 9
    assert asked == [1, 2, 3]


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_rows_that_are_too_long_or_empty_are_not_for_kernels() -> None:
    assert for_kernels(torch.zeros(1, MOST_TOKENS, device=DEVICE))
    assert not for_kernels(torch.zeros(1, MOST_TOKENS + 1, device=DEVICE))
    assert not for_kernels(torch.zeros(0, 5, device=DEVICE)) and not for_kernels(torch.zeros(1, 0, device=DEVICE))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_cuda(capability: int) -> None:
    command = [sys.executable, "-m", "tests.support.compiled_kernels", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_choose", "_choose", "_choose", "_deal", "_list", "_largest", "_whole", "_join"]
