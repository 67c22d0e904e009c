"""Checks of the calibration loaders before anything is measured: their order, and their amount of data."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from scipy.stats import binom
from torch.utils.data import DataLoader, IterableDataset

from catp_lightning.calibration.search.promise import Promise
from catp_lightning.errors import PolicyError, PruningError

MAX_COMPARED = 4096  # batches of a loader without a length whose order is compared
HOPELESS = 1e-9  # a split is refused if enough images fall in the part that tests a promise less probably than this


@dataclass(frozen=True)
class Amount:
    """Amount of data that all processes will read, as far as it can be known before reading.

    Attributes:
        items: number of items of the data sets; None: unknown for some loader.
        batches: number of batches; None: unknown for some loader.
        first: number of items in this process's first batch; None: unknown.
    """

    items: int | None
    batches: int | None
    first: int | None

    def check(self, samples: int, promise: Promise, share: float) -> None:
        """Raise PolicyError if the split is too small for `promise`, judged by the `samples` in the first batch.

        A promise is tested on `share` of the images. An item may be several samples. Where the number of items is
        unknown, later batches are taken to have at most twice as many samples as the first.
        """
        if self.batches is None or not samples:
            return
        if self.items is not None and self.first:
            most = -(-self.items * max(samples, self.first) // self.first)
        else:
            most = 2 * self.batches * samples
        if binom.sf(promise.images_needed - 1, most, share) < HOPELESS:
            counted = "one question each" if promise.over == "images" else "with all their questions"
            raise PolicyError(
                f"The calibration split has at most {most} samples, too few to promise a disagreement of at most "
                f"{promise.max_disagreement:g} with confidence {promise.confidence:g}: a budget is tested on "
                f"{share:.0%} of the images, {counted}, and takes at least {promise.images_needed} there. "
                f"Take {round(promise.images_for(2) / share)} images or more, raise max_disagreement, or lower "
                "confidence."
            )


def refuse_unordered(trainer: Trainer) -> Amount:
    """Raise if the predict loaders cannot be read several times in the same order; return their amount of data.

    Each sampler is iterated over twice and its indices are compared; no data are read.

    Raises:
        PolicyError: a sampler gives another order each time.
        PruningError: a loader is an iterator, which can be read only once.
    """
    items, known = 0, True
    first: int | None = None
    for loader, most in zip(_loaders(trainer), trainer.predict_loop.max_batches, strict=True):
        if hasattr(loader, "__next__"):
            raise PruningError(
                f"The calibration loader is an iterator ({type(loader).__name__}), which ends. Calibration reads its "
                "split several times: give a DataLoader over a data set."
            )
        order = _order(loader, most)
        if order != _order(loader, most):
            raise PolicyError(
                f"The sampler of the calibration loader ({_name_of_sampler(loader)}) gives another order each time. "
                "Calibration reads its split several times and in one order: switch shuffling off, "
                "DataLoader(..., shuffle=False)."
            )
        if order is None or _batch_sampler(loader) is None or not isinstance(most, int):
            known = False
        else:
            items += sum(map(len, order))
            first = len(order[0]) if first is None and order else first
    finite = [most for most in trainer.predict_loop.max_batches if isinstance(most, int)]
    batches = sum(finite) if len(finite) == len(trainer.predict_loop.max_batches) else None
    together = trainer.world_size
    return Amount(items * together if known else None, None if batches is None else batches * together, first)


def _order(loader: Any, most: float) -> list[list[str]] | None:
    """Indices, as text, of the data set's items in each batch of a loader; None if the loader has no sampler."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    batches = _batch_sampler(loader)
    batches = ([item] for item in loader.sampler) if batches is None else batches
    return [list(map(repr, batch)) for batch in islice(batches, most if isinstance(most, int) else MAX_COMPARED)]


def _batch_sampler(loader: Any) -> Any:
    """Return the user's batch sampler without Lightning's wrapper, which is in use already and would start again."""
    sampler = getattr(loader, "batch_sampler", None)
    return getattr(sampler, "_batch_sampler", sampler)


def _name_of_sampler(loader: Any) -> str:
    batches = _batch_sampler(loader)
    return type(loader.sampler if batches is None else getattr(batches, "sampler", batches)).__name__


def _loaders(trainer: Trainer) -> Iterator[Any]:
    return iter(CombinedLoader(trainer.predict_dataloaders, "sequential").flattened)
