"""Registry of scorers or selectors by name: those of this package, and those of other packages' entry points."""

import inspect
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar, get_type_hints

from catp_lightning.errors import PolicyError
from catp_lightning.methods.observation import Needs, Signal
from catp_lightning.utils.messages import warn


class Part(Protocol):
    """Scorer or selector, as far as a registry looks at it."""

    @property
    def needs(self) -> Needs:
        """Signals that it reads, with their layers."""


T = TypeVar("T", bound=Part)


class Registry(Mapping[str, type[T]], Generic[T]):
    """Mapping of names to classes. Entry points are read on first use; a class is imported when it is looked up.

    In another package's pyproject.toml `<name users write> = "<module>:<class>"` registers a class in the entry point
    group `catp_lightning.<kind>s`.

    Args:
        kind: "scorer" or "selector".
        base: class that all are derived from.
        own: the classes of this package. Their names cannot be taken: a class of another package with one of them is
            left out, with a warning.

    Raises:
        PolicyError: when a name is looked up: the class of another package cannot be imported, is not derived from
            `base`, cannot be made without arguments, or two packages register the same name.
    """

    def __init__(self, kind: str, base: Any, own: Mapping[str, type[T]]) -> None:
        self.kind, self.base, self._own = kind, base, dict(own)
        self._loaded: dict[str, type[T]] = {}

    @property
    def group(self) -> str:
        """Name of the entry point group."""
        return f"catp_lightning.{self.kind}s"

    @cached_property
    def _others(self) -> dict[str, list[EntryPoint]]:
        others: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            others.setdefault(point.name, []).append(point)
        for name in sorted(others.keys() & self._own.keys()):
            packages = " and ".join(_package(point) for point in others.pop(name))
            warn(
                f"{packages} brings a {self.kind} named {name!r}, which is the name of one of catp-lightning's own: "
                "that one is used. Rename the entry point.",
                stacklevel=3,
            )
        return dict(sorted(others.items()))

    def __getitem__(self, name: str) -> type[T]:
        others = self._others
        if name in self._own:
            return self._own[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(others[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:  # Mapping's would import the class
        return name in self._own or name in self._others

    def __iter__(self) -> Iterator[str]:
        others = self._others
        yield from self._own
        yield from others

    def usable(self) -> Iterator[tuple[str, type[T]]]:
        """Iterate over names and classes; another package's that raises PolicyError is left out with a warning."""
        for name in self:
            try:
                found = self[name]
            except PolicyError as error:
                warn(f"{error} It is left out.", stacklevel=2)
                continue
            yield name, found

    def __len__(self) -> int:
        return len(self._own) + len(self._others)

    def name_of(self, part: T) -> str:
        """Return the name of an object's class in this registry; the class's own if it is not registered."""
        cls, known = type(part), {**self._loaded, **self._own}
        found = next((name for name, own in known.items() if own is cls), None)
        if found is None:  # imported by hand: its entry point says where it is, without importing anything
            place = f"{cls.__module__}:{cls.__qualname__}"
            others = self._others.items()
            found = next((name for name, points in others if place in [point.value for point in points]), None)
        return cls.__qualname__ if found is None else found

    def is_own(self, part: T) -> bool:
        """Return True if an object's class is one of this package."""
        return type(part) in self._own.values()

    def _load(self, points: list[EntryPoint]) -> type[T]:
        if len(points) > 1:
            packages = " and ".join(_package(point) for point in points)
            raise PolicyError(f"{packages} each bring a {self.kind} named {points[0].name!r}: uninstall all but one.")
        (point,) = points
        with self._faults(point, "cannot be imported"):
            found: Any = point.load()
        with self._faults(point, f"is not a {self.kind}"):
            if not isinstance(found, type) or not issubclass(found, self.base):
                base = f"catp_lightning.methods.{self.base.__name__}"
                raise self._refusal(point, f"is not a class under {base}, but {found!r:.100}")
            if inspect.isabstract(found):
                lacking: frozenset[str] = vars(found)["__abstractmethods__"]
                raise self._refusal(point, f"lacks {', '.join(sorted(lacking))}")
            get_type_hints(found)  # what a policy's arguments are checked against
        with self._faults(point, "cannot be made without arguments"):
            needs = found().needs
        if not isinstance(needs, Mapping) or not all(isinstance(key, Signal) for key in needs):
            raise self._refusal(
                point, f"has needs that are not a mapping of catp_lightning.methods.Signal, but {needs!r:.100}"
            )
        return found

    @contextmanager
    def _faults(self, point: EntryPoint, what: str) -> Iterator[None]:
        """Context that turns whatever another package's code raises, `SystemExit` too, into a PolicyError.

        Nothing is turned once SIGINT or SIGTERM (Ctrl-C, a scheduler) has arrived: the exception is then the signal's.

        Args:
            point: the entry point of the class.
            what: what is wrong with it, for the error message.
        """
        with _signals() as arrived:
            try:
                yield
            except PolicyError:
                raise
            except BaseException as error:
                if arrived:
                    raise
                raise self._refusal(point, f"{what}: {type(error).__name__}: {error!s:.500}") from error

    def _refusal(self, point: EntryPoint, why: str) -> PolicyError:
        return PolicyError(
            f"The {self.kind} {point.name!r} of {_package(point)} (entry point {point.name} = {point.value}) {why}. "
            f"Repair or uninstall that package; CONTRIBUTING.md says what a {self.kind} is."
        )


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


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"the package {point.dist.name} {point.dist.version}"
