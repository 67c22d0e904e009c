"""Registry of scorers by name: those of this package, and those of other packages' entry points."""

import inspect
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from types import FrameType
from typing import get_type_hints

from catp_lightning.errors import PolicyError
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.scorers.base import Scorer
from catp_lightning.utils.messages import warn

GROUP = "catp_lightning.scorers"
"""Entry point group of scorers: `<name users write> = "<module>:<class>"` in a package's pyproject.toml."""


class Registry(Mapping[str, type[Scorer]]):
    """Mapping of names to scorers. Entry points are read on first use; a scorer is imported when it is looked up.

    Args:
        own: the scorers of this package. Their names cannot be taken: a scorer of another package with one of them is
            left out, with a warning.

    Raises:
        PolicyError: when a name is looked up: the scorer of another package cannot be imported, is not a `Scorer`,
            cannot be made without arguments, or two packages register the same name.
    """

    def __init__(self, own: Mapping[str, type[Scorer]]) -> None:
        self._own = dict(own)
        self._loaded: dict[str, type[Scorer]] = {}

    @cached_property
    def _others(self) -> dict[str, list[EntryPoint]]:
        others: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=GROUP):
            others.setdefault(point.name, []).append(point)
        for name in sorted(others.keys() & self._own.keys()):
            packages = " and ".join(_package(point) for point in others.pop(name))
            warn(
                f"{packages} brings a scorer named {name!r}, which is the name of one of catp-lightning's own: that "
                "one is used. Rename the entry point.",
                stacklevel=3,
            )
        return dict(sorted(others.items()))

    def __getitem__(self, name: str) -> type[Scorer]:
        others = self._others
        if name in self._own:
            return self._own[name]
        if name not in self._loaded:
            self._loaded[name] = _load(others[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:  # Mapping's would import the scorer
        return name in self._own or name in self._others

    def __iter__(self) -> Iterator[str]:
        others = self._others
        yield from self._own
        yield from others

    def usable(self) -> Iterator[tuple[str, type[Scorer]]]:
        """Iterate over names and scorers; another package's that raises PolicyError is left out with a warning."""
        for name in self:
            try:
                scorer = self[name]
            except PolicyError as error:
                warn(f"{error} It is left out.", stacklevel=2)
                continue
            yield name, scorer

    def __len__(self) -> int:
        return len(self._own) + len(self._others)

    def name_of(self, scorer: Scorer) -> str:
        """Name of a scorer in this registry; the name of its class if it is not registered."""
        known = {**self._loaded, **self._own}
        return next((name for name, cls in known.items() if cls is type(scorer)), type(scorer).__qualname__)

    def is_own(self, scorer: Scorer) -> bool:
        """True if the scorer is one of this package."""
        return type(scorer) in self._own.values()


def _load(points: list[EntryPoint]) -> type[Scorer]:
    if len(points) > 1:
        packages = " and ".join(_package(point) for point in points)
        raise PolicyError(f"{packages} each bring a scorer named {points[0].name!r}: uninstall all but one.")
    (point,) = points
    with _faults(point, "cannot be imported"):
        found = point.load()
    with _faults(point, "is no scorer"):
        if not isinstance(found, type) or not issubclass(found, Scorer):
            raise _refusal(point, f"is no class under catp_lightning.methods.scorers.Scorer, but {found!r:.100}")
        if inspect.isabstract(found):
            raise _refusal(point, f"lacks {', '.join(sorted(found.__abstractmethods__))}")
        get_type_hints(found)  # what a policy's arguments are checked against
    with _faults(point, "cannot be made without arguments"):
        needs = found().needs
    if not isinstance(needs, Mapping) or not all(isinstance(key, Signal) for key in needs):
        raise _refusal(
            point, f"has needs that are no mapping of catp_lightning.methods.observation.Signal, but {needs!r:.100}"
        )
    return found


@contextmanager
def _faults(point: EntryPoint, what: str) -> Iterator[None]:
    """Context that turns whatever another package's code raises, `SystemExit` too, into a PolicyError.

    Nothing is turned once SIGINT or SIGTERM (Ctrl-C, a scheduler) has arrived: the exception is then the signal's.

    Args:
        point: the entry point of the scorer.
        what: what is wrong with the scorer, for the error message.
    """
    with _signals() as arrived:
        try:
            yield
        except PolicyError:
            raise
        except BaseException as error:
            if arrived:
                raise
            raise _refusal(point, f"{what}: {type(error).__name__}: {error!s:.500}") from error


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Context that yields a list of the SIGINT and SIGTERM signals that arrive inside it; their handlers still run.

    The list stays empty outside the main thread.
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        handler = before[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    watched = [number for number, handler in before.items() if callable(handler)]
    for number in watched:
        signal.signal(number, handle)
    try:
        yield arrived
    finally:
        for number in watched:
            if signal.getsignal(number) is handle:  # the imported package may have installed its own
                signal.signal(number, before[number])


def _refusal(point: EntryPoint, why: str) -> PolicyError:
    return PolicyError(
        f"The scorer {point.name!r} of {_package(point)} (entry point {point.name} = {point.value}) {why}. Repair or "
        "uninstall that package; CONTRIBUTING.md says what a scorer is."
    )


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"the package {point.dist.name} {point.dist.version}"
