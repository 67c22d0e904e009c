"""Perturbations of pictures, on tensors: what calibration does to its images to see which choices survive it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from math import exp

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad

from catp_lightning.errors import PolicyError, did_you_mean
from catp_lightning.utils.hashing import fingerprint, mix, uniform

Perturbation = Callable[[Tensor], Tensor]
"""Function of the pixels of N pictures (images, tiles, crops or frames) of one size, as the user's processor made them:
float [N, C, H, W] -> the same shape, dtype and device, the same each time for the same picture."""

Augment = str | Mapping[str, Perturbation] | Sequence[str | Perturbation] | Perturbation
"""Perturbations as a user gives them; see `perturbations`. YAML is read as the first of these that it can be."""

NOISE = 0.5
"""Standard deviation of the noise, as a share of the picture's."""

BLUR = 0.01
"""Standard deviation of the blur, as a share of the picture's shorter side; half a pixel at least."""

CONTRAST = 0.5
"""Share of each pixel's distance from the picture's mean that is left."""

CROP = 0.85
"""Sides of the cut-out, as a share of the picture's."""

RESIZE = 0.5
"""Sides of the small picture, as a share of the picture's."""


def _of_pictures(perturb: Perturbation) -> Perturbation:
    """Make a perturbation of pictures [N, C, H, W] in float32 take any leading dimensions and any float dtype."""

    @wraps(perturb)
    def perturbed(pixels: Tensor) -> Tensor:
        pictures = pixels.contiguous().view(-1, *pixels.shape[-3:])
        wide = pictures.to(torch.promote_types(pixels.dtype, torch.float32))
        return perturb(wide).to(pixels.dtype).view(pixels.shape)

    return perturbed


@_of_pictures
def noise(pixels: Tensor) -> Tensor:
    """Add Gaussian noise of half the picture's own standard deviation: float [..., C, H, W] -> the same."""
    draws = _drawn(pixels, 1, pixels[0].numel()).double()
    normal = torch.erfinv(2 * (draws + 2**-25) - 1) * 2**0.5  # draws are multiples of 2^-24: never 0 or 1
    deviation = pixels.flatten(1).std(1, correction=0)
    return pixels + NOISE * deviation[:, None, None, None] * normal.to(pixels.dtype).view(pixels.shape)


@_of_pictures
def blur(pixels: Tensor) -> Tensor:
    """Blur by a Gaussian of a hundredth of the picture's shorter side: float [..., C, H, W] -> the same."""
    deviation = max(0.5, BLUR * min(pixels.shape[-2:]))
    reach = int(3 * deviation + 0.5)
    weights = [exp(-0.5 * (at / deviation) ** 2) for at in range(-reach, reach + 1)]
    for _ in range(2):  # along the last dimension, then along the other
        width = pixels.shape[-1]
        padded = pad(pixels, (reach, reach, 0, 0), mode="replicate")
        shifted = (weight * padded[..., at : at + width] for at, weight in enumerate(weights))
        pixels = (sum(shifted, torch.zeros_like(pixels)) / sum(weights)).transpose(-1, -2)
    return pixels


@_of_pictures
def contrast(pixels: Tensor) -> Tensor:
    """Halve the contrast around the picture's mean: float [..., C, H, W] -> the same."""
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return mean + CONTRAST * (pixels - mean)


@_of_pictures
def crop(pixels: Tensor) -> Tensor:
    """Cut out 85% of each side, at a random place, and scale it back: float [..., C, H, W] -> the same."""
    place = (2 * _drawn(pixels, 2, 2) - 1).to(pixels.dtype) * (1 - CROP)
    side = torch.eye(2, dtype=pixels.dtype, device=pixels.device) * CROP
    grid = affine_grid(
        torch.cat([side.expand(len(pixels), 2, 2), place[..., None]], 2), list(pixels.shape), align_corners=False
    )
    return grid_sample(pixels, grid, padding_mode="border", align_corners=False)


@_of_pictures
def resize(pixels: Tensor) -> Tensor:
    """Scale to half of each side and back: float [..., C, H, W] -> the same."""
    height, width = pixels.shape[-2:]
    small = interpolate(pixels, (max(1, int(height * RESIZE)), max(1, int(width * RESIZE))), mode="area")
    return interpolate(small, (height, width), mode="bilinear", align_corners=False)


PERTURBATIONS: Mapping[str, Perturbation] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "crop": crop,
    "resize": resize,
}
"""The default set, by name."""

DEFAULT = "default"
"""Name of the default set."""


def perturbations(augment: Augment | None) -> dict[str, Perturbation]:
    """Return perturbations by name: "default", names of the default set, functions, or functions by names of their own.

    Raises:
        PolicyError: a name is unknown, empty or given twice, or something is not a function.
    """
    if augment is None:
        return {}
    if isinstance(augment, Mapping):
        given = list(augment.items())
    elif isinstance(augment, str) or not isinstance(augment, Sequence):
        given = _named(augment)
    else:
        given = [found for one in augment for found in _named(one)]
    found = dict(given)
    if len(found) < len(given):
        names = [name for name, _ in given]
        twice = next(name for name in names if names.count(name) > 1)
        raise PolicyError(f"augment names {twice!r:.200} twice; give functions by names of their own, in a dictionary.")
    for name, function in found.items():
        if not isinstance(name, str) or not name:
            raise PolicyError(f"augment has the name {name!r:.200}; a name is a text that is not empty.")
        if not callable(function):
            raise PolicyError(
                f"augment[{name!r:.200}] is {function!r:.200}; it takes functions of pixels, [N, C, H, W] -> the same."
            )
    return found


def qualified(function: Perturbation) -> str:
    """Return module and name of a function, or of an object's class; a change inside it is not noticed."""
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _named(one: object) -> list[tuple[str, Perturbation]]:
    """Return names and functions of one entry: a name, the name of the default set, or a function."""
    if one == DEFAULT:
        return list(PERTURBATIONS.items())
    if isinstance(one, str):
        if one not in PERTURBATIONS:
            known = [DEFAULT, *PERTURBATIONS]
            raise PolicyError(
                f"There is no perturbation {one!r:.200}.{did_you_mean(one, known)} Known: {', '.join(known)}; or give "
                "a function of pixels, float [N, C, H, W] -> the same."
            )
        return [(one, PERTURBATIONS[one])]
    if not callable(one):
        raise PolicyError(
            f"augment has {one!r:.200}; it takes names ({', '.join([DEFAULT, *PERTURBATIONS])}), functions of pixels, "
            "or a dictionary of functions by name."
        )
    return [(getattr(one, "__name__", type(one).__name__), one)]


def _drawn(pictures: Tensor, salt: int, count: int) -> Tensor:
    """Draw numbers in [0, 1) from each picture's own pixels: [N, C, H, W] -> float32 [N, count].

    Batches, processes and other random numbers do not matter.
    """
    return uniform(mix(fingerprint(pictures) + salt), count)
