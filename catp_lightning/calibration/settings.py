"""Settings of a calibration that trade its time for its precision."""

from dataclasses import dataclass

from catp_lightning.errors import PolicyError


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings that trade a calibration's time for its precision; the defaults suit a few hundred questions.

    Attributes:
        probes: number of random subsets of each sample's tokens at each size, at least 1. Time grows with it, and so
            does the precision of fitted head weights.
        sizes: shares of the tokens that subsets keep, beside smaller budgets, in (0, 1): answers change where little
            is kept, so there is something to learn. A network learns from these sizes alone.
        folds: number of folds for cross-fitting, at least 2: the candidate that answers an image was fitted without the
            image's fold.
        checked: share of the images in the checking part, on which nothing is decided, in (0, 1).
        promised: the same with a promise, which is tested there by counting and needs many images.
        first_round: samples in the first round of the race, at least: with fewer, good candidates would be eliminated
            by chance.
        eta: one in this many candidates goes on to the next round, as in successive halving (1502.07943); at least 2.
        counts: True: a budget may be spent unevenly, on samples whose question needs more, where that is ahead of equal
            counts at the same mean; one further pass over the split measures it. False: all samples keep the budget.

    Raises:
        PolicyError: a value is not allowed.
    """

    probes: int = 10
    sizes: tuple[float, ...] = (0.25, 0.125, 0.0625)
    folds: int = 5
    checked: float = 0.2
    promised: float = 0.5
    first_round: int = 32
    eta: int = 4
    counts: bool = False

    def __post_init__(self) -> None:
        for name, least in (("probes", 1), ("folds", 2), ("first_round", 1), ("eta", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise PolicyError(f"{name} is {value!r:.200}; it is an integer of at least {least}.")
        if type(self.counts) is not bool:
            raise PolicyError(f"counts is {self.counts!r:.200}; it is True or False.")
        object.__setattr__(self, "sizes", tuple(self.sizes))  # YAML has lists
        for name in ("sizes", "checked", "promised"):
            value = getattr(self, name)
            for share in value if isinstance(value, tuple) else (value,):
                if not isinstance(share, float) or not 0 < share < 1:
                    raise PolicyError(f"{name} is {value!r:.200}; shares are floats between 0 and 1, neither included.")


DEFAULTS = CalibrationSettings()
