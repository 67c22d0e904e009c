"""Base class of statistics: measured on the learning part beside the probes, told in evidence and in the report."""

from abc import abstractmethod
from typing import Any, ClassVar, Self

from matplotlib.figure import Figure

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.sums import Sums


class Statistic(Sums):
    """Finding that decides nothing: sums over the samples of the whole split, an entry in the evidence, a figure.

    Its states are sums, or least and greatest values, added with `add_state(..., dist_reduce_fx=...)`: several
    processes add up to exactly what one would have found, and an interrupted calibration goes on from them.

    Attributes:
        name: key of its entry in a policy's evidence, and name of its figure's file.
        caption: text below its figure, in Markdown; empty if it draws none.
        copies: True if copies of the samples on perturbed images count too.
    """

    name: ClassVar[str]
    caption: ClassVar[str]
    copies: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of(cls, plan: Plan) -> Self:
        """Return the statistic for one calibration, with nothing measured yet."""

    @abstractmethod
    def update(self, samples: Samples) -> None:
        """Add a batch of samples whose unpruned answer is finite."""

    @abstractmethod
    def compute(self) -> Any:
        """Return the entry in the evidence, plain JSON types, over all processes."""

    @staticmethod
    @abstractmethod
    def figure(entry: Any) -> Figure | None:
        """Draw the entry; None if there is nothing to draw."""
