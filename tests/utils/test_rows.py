"""Rows by index: as `gather`, `scatter` and `scatter_add` have them, element by element."""

import pytest
import torch

from catp_lightning.utils.rows import add_rows, put_rows, take_rows


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("shape", [(), (4,), (2, 5)])
def test_rows_are_those_of_gather_scatter_and_scatter_add(samples: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(samples)
    values = torch.randn(samples, 9, *shape, generator=generator, dtype=torch.float64, device="cpu")
    values[0, 2] = torch.nan
    at = torch.rand(samples, 9, generator=generator).argsort(1)
    index = at.view(samples, 9, *[1] * len(shape)).expand_as(values)
    full = values.new_zeros(samples, 12, *shape)
    expected = values.gather(1, index[:, :6])
    torch.testing.assert_close(take_rows(values, at[:, :6]), expected, rtol=0, atol=0, equal_nan=True)
    expected = full.scatter(1, index + 2, values)
    torch.testing.assert_close(put_rows(values, at + 2, 12), expected, rtol=0, atol=0, equal_nan=True)
    together = index // 3
    expected = full.scatter_add(1, together, values)
    torch.testing.assert_close(add_rows(values, at // 3, 12), expected, rtol=0, atol=1e-12, equal_nan=True)


def test_rows_have_the_gradient_of_gather() -> None:
    values = torch.randn(2, 5, 3, dtype=torch.float64, device="cpu", requires_grad=True)
    at = torch.tensor([[4, 1, 1], [0, 3, 2]], dtype=torch.int64, device="cpu")
    assert torch.autograd.gradcheck(lambda given: take_rows(given, at), values)
    assert torch.autograd.gradcheck(lambda given: put_rows(given[:, :3], at * 2 + torch.arange(3), 12), values)
    assert torch.autograd.gradcheck(lambda given: add_rows(given[:, :3], at, 6), values)
