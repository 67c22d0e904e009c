"""Share of images unlike those of a policy's calibration, and a warning if there are more than a few."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.methods.guard import Guard, Summaries
from catp_lightning.methods.summary import SUMMARY
from catp_lightning.utils.messages import rank_zero_warn

SHARE = 0.01
"""Share of images far outside from which on there is a warning; of images like calibration's it is below a tenth."""


class _OutsideCounts(Metric):
    """Metric that counts images, those far outside, and by number of the summary those outside in it, with extremes."""

    full_state_update = False
    images: Tensor
    outside: Tensor
    by_number: Tensor
    least: Tensor
    most: Tensor

    def __init__(self) -> None:
        super().__init__()
        size = len(SUMMARY)
        for name, zeros in (("images", 0), ("outside", 0), ("by_number", [0] * size)):
            self.add_state(name, torch.tensor(zeros, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        for name, start, reduce in (("least", math.inf, "min"), ("most", -math.inf, "max")):
            self.add_state(name, torch.full((size,), start, dtype=torch.float32, device="cpu"), dist_reduce_fx=reduce)

    @property
    def update_called(self) -> bool:
        """Always True: a process may have no image, of which torchmetrics would warn."""
        return True

    def update(self, numbers: Tensor, outside: Tensor) -> None:
        """Add I images: float [I, S], and bool [I, S]. A number that is NaN counts as infinite."""
        # New tensors: a state made under inference_mode may not be changed in place outside it.
        values = numbers.to(self.least).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        nothing = torch.full((1, len(SUMMARY)), math.inf, dtype=values.dtype, device=values.device)
        self.images = self.images + len(values)
        self.outside = self.outside + outside.any(1).sum()
        self.by_number = self.by_number + outside.sum(0)
        self.least = self.least.minimum(torch.cat([nothing, values.where(outside, math.inf)]).amin(0))
        self.most = self.most.maximum(torch.cat([-nothing, values.where(outside, -math.inf)]).amax(0))

    def found(self) -> dict[str, list[float]]:
        """Return the states of this process; inside `compute` those of all."""
        return {
            name: getattr(self, name).reshape(-1).tolist()
            for name in ("images", "outside", "by_number", "least", "most")
        }

    def compute(self) -> dict[str, list[float]]:
        return self.found()


class OutsideCheck:
    """Counts the images of one evaluation loop that are far outside of what the policy's calibration saw.

    Args:
        guard: watches over the images.
        device: device of the counts.

    Attributes:
        share: share of images far outside over all processes, once `finish` has found it.
    """

    def __init__(self, guard: Guard, device: torch.device) -> None:
        self.guard, self.share = guard, 0.0
        self._counts, self._warned = _OutsideCounts().to(device), False

    def see(self, found: Summaries) -> None:
        """Add the images of a prefill."""
        device = self._counts.images.device
        self._counts.update(found.numbers.to(device), found.outside.to(device))

    def warn_early(self) -> None:
        """Warn, once, if this process has met at least two images far outside, and more than 1% of its images."""
        if self._warned:
            return
        images, outside = torch.stack([self._counts.images, self._counts.outside]).tolist()
        if outside > max(1, SHARE * images):
            self._warn(self._counts.found())

    def finish(self) -> None:
        """Find the share over all processes, and warn if it is more than 1% and nothing was said before.

        Every process must call this at the end of the epoch.
        """
        found = self._counts.compute()
        self.share = found["outside"][0] / max(1, found["images"][0])
        if not self._warned and self.share > SHARE:
            self._warn(found)

    def _warn(self, found: dict[str, list[float]]) -> None:
        self._warned = True
        counts = found["by_number"]
        worst = max(range(len(counts)), key=lambda number: counts[number])
        name = list(SUMMARY)[worst]
        of = self.guard.ranges.features[name]
        least, most = found["least"][worst], found["most"][worst]
        value = (
            "not a number" if math.isinf(least) else f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
        )
        ahead = (
            "Such samples are pruned by the fallback."
            if self.guard.fallback is not None
            else "What calibration measured may not hold for them. Calibrate on images like these, or with augment=, "
            "or give TokenPruning a rule for such samples: fallback='divprune'."
        )
        rank_zero_warn(
            f"{int(found['outside'][0]):,} of {int(found['images'][0]):,} images so far are unlike those the policy "
            f"was calibrated on, most in {name!r} ({SUMMARY[name]}): {value}, where calibration saw {of.low:.3g} to "
            f"{of.high:.3g}. {ahead}"
        )


def outside_check(guard: Guard | None, device: torch.device) -> OutsideCheck | None:
    """Return an `OutsideCheck` for one loop; None without a guard."""
    return None if guard is None else OutsideCheck(guard, device)
