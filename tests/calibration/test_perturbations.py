"""Perturbations change pictures as much as they say, each by itself, and the same each time."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import CrossAttentionCalibration, PolicyError
from catp_lightning.calibration.perturbations import (
    BLUR,
    CONTRAST,
    CROP,
    NOISE,
    PERTURBATIONS,
    Perturbation,
    perturbations,
    qualified,
)
from catp_lightning.calibration.replay.perturber import perturbed

each = pytest.mark.parametrize("perturbation", PERTURBATIONS.values(), ids=PERTURBATIONS)


def pictures(*shape: int) -> Tensor:
    """Smooth pictures, no two alike."""
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.avg_pool2d(found.view(-1, *shape[-3:]), 5, 1, 2).view(shape) + 0.3


@each
def test_a_picture_is_perturbed_the_same_whatever_is_beside_it(perturbation: Perturbation) -> None:
    pixels = pictures(2, 3, 4, 3, 30, 21)
    before, state = pixels.clone(), torch.get_rng_state()
    found = perturbation(pixels)
    assert (found.shape, found.dtype) == (pixels.shape, pixels.dtype) and found.isfinite().all()
    assert (found - pixels).abs().amax((-1, -2, -3)).gt(0.01).all(), "every picture is changed"
    assert torch.equal(perturbation(pixels[1, 2, 3]), found[1, 2, 3])
    assert torch.equal(perturbation(pixels.flatten(0, 2).flip(0)).flip(0), found.flatten(0, 2))
    assert torch.equal(pixels, before) and torch.equal(torch.get_rng_state(), state)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_is_kept_and_global_defaults_do_not_matter(perturbation: Perturbation, dtype: torch.dtype) -> None:
    pixels = pictures(2, 3, 16, 16).to(dtype)
    expected = perturbation(pixels)
    with torch.device("meta"):
        found = perturbation(pixels)
    assert found.dtype == dtype and torch.equal(found, expected)
    torch.testing.assert_close(found.double(), perturbation(pixels.double()), atol=0.05, rtol=0.02)


@each
def test_a_picture_of_one_colour_stays_and_the_tiniest_can_be_perturbed(perturbation: Perturbation) -> None:
    pixels = torch.full((1, 3, 20, 20), 0.7)
    torch.testing.assert_close(perturbation(pixels), pixels)
    assert perturbation(torch.ones(2, 3, 1, 1)).shape == (2, 3, 1, 1)


def test_strengths_are_those_that_are_documented() -> None:
    pixels = pictures(6, 3, 64, 64)
    deviation = pixels.flatten(1).std(1)
    for scale in (1.0, 20.0):  # of whatever scale the processor makes pixels
        added = PERTURBATIONS["noise"](pixels * scale) - pixels * scale
        torch.testing.assert_close(added.flatten(1).std(1), NOISE * scale * deviation, rtol=0.03, atol=0)
        assert added.flatten(1).mean(1).abs().lt(0.03 * scale * deviation).all()
        assert added.abs().max() > 3 * NOISE * scale * deviation.min(), "with tails, as Gaussian noise has"
    assert torch.corrcoef(added.flatten(1)).tril(-1).abs().max() < 0.05, "each picture has noise of its own"
    flat = PERTURBATIONS["contrast"](pixels)
    torch.testing.assert_close(flat.flatten(1).std(1), CONTRAST * deviation)
    torch.testing.assert_close(flat.flatten(1).mean(1), pixels.flatten(1).mean(1))


def test_blur_is_gaussian() -> None:
    point = torch.zeros(1, 1, 301, 401)
    point[..., 150, 200] = 1
    found = PERTURBATIONS["blur"](point)[0, 0].double()
    assert found.sum() == pytest.approx(1, abs=1e-5) and found.argmax() == 150 * 401 + 200
    for dimension, centre in ((0, 150), (1, 200)):
        along = found.sum(1 - dimension)
        places = torch.arange(len(along)) - centre
        assert (along @ places.double().square()).sqrt() == pytest.approx(BLUR * 301, rel=0.03)


def test_a_crop_is_a_window_of_the_picture_scaled_back() -> None:
    ramp = torch.arange(100.0).expand(100, 100)
    pixels = torch.stack([ramp, ramp.T])[None] + torch.arange(20.0)[:, None, None, None]
    found = PERTURBATIONS["crop"](pixels) - torch.arange(20.0)[:, None, None, None]
    steps = found[:, 0, :, 1:-1].diff(dim=-1)
    torch.testing.assert_close(steps, torch.full_like(steps, CROP), atol=1e-3, rtol=0)
    start = found[:, 0, 0, 0]
    assert start.min() >= 0 and start.max() <= 100 * (1 - CROP) and start.std() > 2, "at another place of each picture"
    assert (found[:, 0, 0, 0] - found[:, 1, 0, 0]).abs().max() > 2, "rows and columns apart"


def test_resizing_loses_what_is_finer_than_two_pixels_and_keeps_the_rest() -> None:
    fine = (torch.arange(32) % 2).float().expand(32, 32) - torch.arange(32)[:, None] % 2
    coarse = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    found = PERTURBATIONS["resize"](coarse + fine)
    torch.testing.assert_close(found[..., 2:-2], coarse[..., 2:-2], atol=1e-5, rtol=0)


@each
def test_padding_stays_zero_and_what_is_beside_it_is_perturbed_as_without_it(perturbation: Perturbation) -> None:
    pixels = torch.zeros(2, 3, 4, 3, 24, 24)
    pixels[0, 0, :3] = pictures(3, 3, 24, 24)
    pixels[1, 0, 0, :, :17, :11] = pictures(3, 17, 11)
    found = perturbed(pixels, "own", perturbation)
    assert torch.equal(found[0, 0, :3], perturbation(pixels[0, 0, :3]))
    assert torch.equal(found[1, 0, 0, :, :17, :11], perturbation(pixels[1, 0, 0, :, :17, :11]))
    found[0, 0, :3] = found[1, 0, 0, :, :17, :11] = 0
    assert not found.any(), "tiles and images of zeros stay zeros, and so does what pads a smaller picture"


def test_a_function_of_the_user_gets_a_copy_outside_autocast_and_pixels_that_are_no_numbers_stay() -> None:
    pixels = pictures(3, 3, 8, 8)
    pixels[1, 0, 0, 0] = torch.nan
    before = pixels.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = perturbed(pixels, "own", lambda own: own.mul_(2).transpose(-1, -2) @ torch.eye(8))
    expected = 2 * before.transpose(-1, -2)
    assert torch.equal(found[::2], expected[::2]) and found[1].isnan().any()
    torch.testing.assert_close(pixels, before, equal_nan=True, rtol=0, atol=0)


WRONG: dict[str, tuple[Any, str]] = {
    "another shape": (lambda pixels: pixels[..., 1:], r"returned torch.float32 \[2, 3, 8, 7\] on cpu"),
    "another dtype": (lambda pixels: pixels.double(), r"returned torch.float64 \[2, 3, 8, 8\] on cpu"),
    "no tensor": (lambda pixels: pixels.numpy(), "returned a ndarray"),
    "no number": (lambda pixels: pixels / 0, "NaN or infinite"),
    "failing": (lambda pixels: pixels @ torch.eye(3), r"failed on pixels, torch.float32 \[2, 3, 8, 8\].*RuntimeError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_function_that_returns_other_than_pixels_is_refused_by_name(name: str) -> None:
    function, why = WRONG[name]
    with pytest.raises(PolicyError, match=rf"perturbation 'my {name}' .*{why}.*leave it out of augment"):
        perturbed(pictures(2, 3, 8, 8), f"my {name}", function)


class Dimmed:
    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels / 2


def dim(pixels: Tensor, by: float = 2) -> Tensor:
    return pixels / by


def test_perturbations_are_named_in_many_ways() -> None:
    assert perturbations(None) == perturbations([]) == {}
    assert perturbations("default") == perturbations(["default"]) == dict(PERTURBATIONS)
    assert perturbations("blur") == {"blur": PERTURBATIONS["blur"]}
    assert perturbations(("crop", dim)) == {"crop": PERTURBATIONS["crop"], "dim": dim}
    assert perturbations({"a third": dim}) == {"a third": dim}
    assert list(perturbations(Dimmed())) == ["Dimmed"]
    assert list(CrossAttentionCalibration(augment=["noise", "resize"]).perturbations) == ["noise", "resize"]


def test_functions_are_known_by_where_they_are_defined() -> None:
    found = [qualified(function) for function in (dim, partial(dim, by=3), Dimmed())]
    assert found == [f"{__name__}.dim", f"{__name__}.dim", f"{__name__}.Dimmed"]
    assert qualified(PERTURBATIONS["noise"]) == "catp_lightning.calibration.perturbations.noise"


@pytest.mark.parametrize(
    ("augment", "why"),
    [
        ("nois", r"no perturbation 'nois'. Did you mean 'noise'\? Known: default, noise, blur, contrast, crop, resize"),
        (["blur", "x" * 500], r"no perturbation 'x{199}\. Known"),
        (["noise", "default"], "names 'noise' twice"),
        (3, "augment has 3; it takes names"),
        ({"dim": "noise"}, r"augment\['dim'\] is 'noise'; it takes functions"),
        ({1: dim}, "the name 1; a name is a text"),
        ({"": dim}, "the name ''; a name is a text"),
    ],
)
def test_what_is_no_perturbation_is_refused_at_once(augment: Any, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        CrossAttentionCalibration(augment=augment)
