"""Names to scorers: those of this package, and those that other packages bring by an entry point."""

import inspect
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from catp_lightning.errors import PolicyError
from catp_lightning.saying import warn
from catp_lightning.scorers.base import Scorer

GROUP = "catp_lightning.scorers"
"""The entry point group: `<name users write> = "<module>:<class>"` in a package's pyproject.toml."""


class Registry(Mapping[str, type[Scorer]]):
    """Scorers by name; the names of installed packages are read on first use, a scorer is imported when looked up.

    Args:
        own: the scorers of this package. Their names cannot be taken: another package's that is called alike is left
            out, with a warning.

    Raises:
        PolicyError: on looking a name up, where another package's cannot be imported, is no scorer, cannot be made
            without arguments, or where two packages bring the same name.
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

    def __contains__(self, name: object) -> bool:  # Mapping's would import
        return name in self._own or name in self._others

    def __iter__(self) -> Iterator[str]:
        others = self._others
        yield from self._own
        yield from others

    def usable(self) -> Iterator[tuple[str, type[Scorer]]]:
        """Names and scorers, without those of other packages that do not work; each of these warns."""
        for name in self:
            try:
                scorer = self[name]
            except PolicyError as error:
                warn(f"{error} It is left out.", stacklevel=2)
                continue
            yield name, scorer

    def __len__(self) -> int:
        return len(self._own) + len(self._others)


def _load(points: list[EntryPoint]) -> type[Scorer]:
    if len(points) > 1:
        packages = " and ".join(_package(point) for point in points)
        raise PolicyError(f"{packages} each bring a scorer named {points[0].name!r}: uninstall all but one.")
    (point,) = points
    try:
        found = point.load()
    except Exception as error:
        raise _refusal(point, f"cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, Scorer):
        raise _refusal(point, f"is no class under catp_lightning.scorers.Scorer, but {found!r:.100}")
    if inspect.isabstract(found):
        raise _refusal(point, f"lacks {', '.join(sorted(found.__abstractmethods__))}")
    try:
        found()
    except Exception as error:
        raise _refusal(point, f"cannot be made without arguments: {type(error).__name__}: {error}") from error
    return found


def _refusal(point: EntryPoint, why: str) -> PolicyError:
    return PolicyError(
        f"The scorer {point.name!r} of {_package(point)} (entry point {point.name} = {point.value}) {why}. Repair or "
        "uninstall that package; CONTRIBUTING.md says what a scorer is."
    )


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"the package {point.dist.name} {point.dist.version}"
