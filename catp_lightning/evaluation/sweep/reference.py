"""The method that a sweep compares the others with."""

from collections.abc import Mapping, Sequence

from catp_lightning.errors import PolicyError
from catp_lightning.evaluation.sweep.jobs import Outcome
from catp_lightning.evaluation.sweep.methods import CALIBRATED, Job
from catp_lightning.models import Family


def _named(title: str) -> str:
    """Return a title without its part in brackets: `random` for `random (3 seeds)`."""
    return title.partition(" (")[0]


def check_reference(reference: str | None, titles: Sequence[str], notes: Mapping[str, str], family: Family) -> None:
    known = {*titles, *map(_named, titles), *notes}
    if reference is not None and reference not in known:
        raise PolicyError(
            f"The reference {reference!r} is not among the methods that are compared on {type(family.model).__name__}: "
            f"{', '.join(dict.fromkeys(titles))}."
        )


def reference_of(wanted: str | None, outcomes: Mapping[Job, Outcome], notes: Mapping[str, str]) -> str:
    """Return the title of the reference: `wanted` if it is in the table, otherwise `CALIBRATED` or the first one."""
    titles = list(dict.fromkeys(job.title for job in outcomes))
    chosen = [title for title in titles if wanted in (title, _named(title))]
    return (chosen or [title for title in titles if title == CALIBRATED] or titles)[0]
