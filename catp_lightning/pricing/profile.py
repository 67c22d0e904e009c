"""`PrefillProfile`: seconds of a model's prefill on this device as a function of the rows that each layer reads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from catp_lightning.errors import PolicyError
from catp_lightning.methods.schedule import Step
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.models import Family
from catp_lightning.policy import PruningPolicy
from catp_lightning.pricing.prompts import Prompts
from catp_lightning.pricing.solve import tokens_read

Points = tuple[tuple[int, float], ...]
"""Numbers and the seconds measured at each, in ascending order."""


@dataclass(frozen=True)
class PrefillProfile:
    """Seconds that one model's prefill takes on one device, measured by `measure` and predicted for other schedules.

    A prefill here is one call of the part of the language model that reads visual tokens, on a batch, with all that
    pruning does in it; and what observing the vision part takes more than running it. Layers are taken to cost alike:
    the time of a schedule is the mean, over its layers, of what the whole model takes with as many rows as the layer
    reads, and the cost of each of its methods.

    Attributes:
        model: class name of the model.
        device: name of the device.
        batch_size: number of samples of the batch.
        depth: number of layers.
        image_alone: True if rows are those of the image alone, which text attends to; else those of the prompt.
        rows: seconds by rows of the batch's longest sample, each read by all layers; the last point is not pruned.
        costs: for each method, the seconds that it adds, by visual tokens that it keeps of the sample that had most.
    """

    model: str
    device: str
    batch_size: int
    depth: int
    image_alone: bool
    rows: Points
    costs: Mapping[str, Points] = field(default_factory=dict)

    def check(self, family: Family) -> None:
        """Raise PolicyError if the profile is of another model, or one of another depth."""
        model, depth = type(family.model).__name__, family.depth
        if (self.model, self.depth) != (model, depth):
            raise PolicyError(
                f"The profile is of a {self.model} of {self.depth} layers, and this model is a {model} of {depth}. "
                "Measure its own: catp_lightning.pricing.measure(module, batch, policies)."
            )

    def seconds(self, prompts: Prompts, visual: Tensor | None = None) -> Tensor:
        """Return seconds of a prefill without the cost of choosing: float64 [N], of a batch of samples like each.

        Args:
            prompts: N samples.
            visual: int64 [N, depth], visual tokens that each layer reads; None: the model is not pruned.
        """
        read = prompts.tokens[:, None].expand(-1, self.depth) if visual is None else visual
        rows = read if self.image_alone else prompts.text[:, None] + read
        return between(self.rows, rows).clamp(min=0).mean(1)

    def predict(self, policy: PruningPolicy, prompts: Prompts) -> Tensor:
        """Return seconds of a prefill under a policy, choosing included: float64 [N], of a batch of samples like each.

        Raises:
            PolicyError: the cost of one of its methods was not measured, or how many tokens stay depends on the prompt.
        """
        steps = [step for step in policy.steps() if step.keep != 1.0 or isinstance(step.keep, int)]
        if not steps:
            return self.seconds(prompts)
        found = self.seconds(prompts, tokens_read(steps, prompts.tokens, self.depth))
        for number, step in enumerate(steps):
            if (name := named(step)) not in self.costs:
                raise PolicyError(
                    f"The profile of {self.model} has no cost of {name}, but of {', '.join(self.costs) or 'no method'}."
                    " Measure it again with the policy among `policies`."
                )
            left = tokens_read(steps[: number + 1], prompts.tokens, self.depth)[:, -1]
            found = found + between(self.costs[name], left) * (prompts.tokens > 0)
        return found

    def share(self, policy: PruningPolicy, prompts: Prompts) -> float:
        """Return the time of all prompts under a policy as a share of their time unpruned.

        Raises:
            PolicyError: as `predict`.
        """
        return float(self.predict(policy, prompts).sum() / self.seconds(prompts).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return the profile in JSON types."""
        costs = {name: [list(point) for point in points] for name, points in self.costs.items()}
        return {**vars(self), "rows": [list(point) for point in self.rows], "costs": costs}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PrefillProfile":
        """Return the profile that `to_dict` gave."""
        costs = {name: _points(part) for name, part in values["costs"].items()}
        return cls(**{**values, "rows": _points(values["rows"]), "costs": costs})


def _points(values: Iterable[Sequence[Any]]) -> Points:
    return tuple((int(at), float(seconds)) for at, seconds in values)


def named(step: Step) -> str:
    """Return the name under which a method's cost is kept: its scorer and selector, "fastv with top-k"."""
    return f"{SCORERS.name_of(step.method.scorer)} with {SELECTORS.name_of(step.method.selector)}"


def between(points: Points, where: Tensor) -> Tensor:
    """Return values between measured points on straight lines, and beyond the ends on the last line.

    >>> between(((10, 1.0), (20, 3.0), (40, 4.0)), torch.tensor([5, 15, 40, 60]))
    tensor([0., 2., 4., 5.], dtype=torch.float64)
    """
    x, y = (torch.tensor(part, dtype=torch.float64, device=where.device) for part in zip(*points, strict=True))
    wanted = where.to(torch.float64)
    if len(x) == 1:
        return y.expand(where.shape)
    left = (torch.searchsorted(x, wanted, right=True) - 1).clamp(0, len(x) - 2)
    slope = (y[left + 1] - y[left]) / (x[left + 1] - x[left])
    return y[left] + slope * (wanted - x[left])
