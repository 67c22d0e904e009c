"""Perturb the pixels that a model's vision part reads, while a batch is answered once more."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.calibration.perturbations import Perturbation
from catp_lightning.calibration.plan import Plan
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.utils.hooks import hooked


class Perturber:
    """Perturber of the pixels that reach the vision part of a plan's model, and of its guide.

    What the user's step and the model itself are given stays as it is: fingerprints of images, and with them parts,
    folds and rounds, are those of the originals.

    Args:
        plan: plan of the calibration; without perturbations nothing is hooked.

    Raises:
        PruningError: it is not known where a model reads pixels of pictures.
    """

    def __init__(self, plan: Plan) -> None:
        families = [plan.family, *([] if plan.guide is None else [plan.guide.family])] if plan.perturbations else []
        for family in families:
            if not family.pixel_readers:
                raise _no_pictures(family.model, "it is not known where it reads them")
        self.perturbations = plan.perturbations
        self._readers = [module for family in families for module in family.pixel_readers]
        self._name: str | None = None  # of the running perturbation
        self._reached = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which pixels can be perturbed; hooks are in place only there.

        They stay between perturbations, or what is compiled would be compiled anew for each.
        """
        with ExitStack() as undo:
            for module in self._readers:
                undo.enter_context(hooked(module, before=self._enter))
            yield

    @contextmanager
    def perturbing(self, name: str) -> Iterator[None]:
        """Perturb all pixels while inside.

        Raises:
            PruningError: no pixels reached the vision part while inside.
        """
        self._name, self._reached = name, False
        try:
            yield
        finally:
            self._name = None
        if not self._reached:
            raise PruningError(
                f"The step was run again on images perturbed by {name!r:.200}, and the vision part was not. "
                "Calibrate without augment=, or with a step that keeps no image features from one run to the next."
            )

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._name is None:
            return None
        self._reached = True
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        if pixels.dim() < 4 or not pixels.is_floating_point():
            raise _no_pictures(module, f"it reads {pixels.dtype} {list(pixels.shape)}")
        changed = perturbed(pixels, self._name, self.perturbations[self._name])
        if "pixel_values" in kwargs:
            return args, {**kwargs, "pixel_values": changed}
        return (changed, *args[1:]), kwargs


@torch.no_grad()
def perturbed(pixels: Tensor, name: str, perturbation: Perturbation) -> Tensor:
    """Perturb pictures without their padding: rows below and columns right of all that is not zero.

    Tiles and images of zeros alone, with which batches are filled up, stay as they are.

    Args:
        pixels: float [..., C, H, W].
        name: name of the perturbation, for errors.
        perturbation: the perturbation.

    Returns:
        The same shape, dtype and device; `pixels` themselves are not changed.

    Raises:
        PolicyError: the perturbation fails, or returns something else than finite pixels of the same shape, dtype and
            device.
    """
    found = pixels.detach().clone(memory_format=torch.contiguous_format).view(-1, *pixels.shape[-3:])
    sizes = _sizes(found)
    for height, width in sizes.unique(dim=0).tolist():
        if height:
            here = (sizes == sizes.new_tensor([height, width])).all(1)
            own = found[here, :, :height, :width].contiguous()  # sums do not depend on what lies around it
            found[here, :, :height, :width] = _checked(own, name, perturbation)
    return found.view(pixels.shape)


def _sizes(pictures: Tensor) -> Tensor:
    """Return height and width of each picture without padding: [N, C, H, W] -> int64 [N, 2], 0 of zeros alone."""
    filled = (pictures != 0).any(1)
    ends = []
    for other in (2, 1):
        along = filled.any(other)
        places = torch.arange(1, along.shape[1] + 1, dtype=torch.int64, device=along.device)
        ends.append((along * places).amax(1))
    return torch.stack(ends, 1)


def _checked(pictures: Tensor, name: str, perturbation: Perturbation) -> Tensor:
    """Return the perturbed pictures, float [N, C, H, W], which are a copy of the user's.

    Pictures that hold NaN or infinities already may stay so: their samples are left out.
    """
    expected, finite = f"{pictures.dtype} {list(pictures.shape)} on {pictures.device}", _finite(pictures)
    try:
        with torch.autocast(pictures.device.type, enabled=False):
            found = perturbation(pictures)
    except Exception as error:
        raise PolicyError(
            f"The perturbation {name!r:.200} failed on pixels, {expected}: {type(error).__name__}: {error!s:.200}. "
            "It is a function of pixels [N, C, H, W], N pictures of one size as the processor makes them; correct it, "
            "or leave it out of augment."
        ) from error
    if not isinstance(found, Tensor):
        raise _wrong(name, expected, f"a {type(found).__name__}")
    if (found.shape, found.dtype, found.device) != (pictures.shape, pictures.dtype, pictures.device):
        raise _wrong(name, expected, f"{found.dtype} {list(found.shape)} on {found.device}")
    if not bool((_finite(found) | ~finite).all()):
        raise _wrong(name, expected, "pixels that are NaN or infinite")
    return found


def _finite(pictures: Tensor) -> Tensor:
    return pictures.isfinite().flatten(1).all(1)


def _wrong(name: str, expected: str, got: str) -> PolicyError:
    return PolicyError(
        f"The perturbation {name!r:.200} was given pixels, {expected}, and returned {got}: it returns finite pixels of "
        "the same shape, dtype and device. Correct it, or leave it out of augment."
    )


def _no_pictures(module: nn.Module, why: str) -> PruningError:
    return PruningError(
        f"augment= perturbs pixels of pictures, float [..., C, H, W], and {type(module).__name__} is not known to read "
        f"such: {why}. Calibrate without augment=, or give perturbed images in the calibration split."
    )
