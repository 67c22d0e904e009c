"""Stages of a schedule: where visual tokens leave, by which method, and how many stay."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from catp_lightning.errors import PolicyError
from catp_lightning.methods.schedule import Step
from catp_lightning.policy.budgets import Budget, check_keep, keep_from_json, keep_to_json
from catp_lightning.policy.building import build_method
from catp_lightning.policy.frozen import frozen


@dataclass(frozen=True)
class Stage:
    """One method of a schedule with its budget. Its scorer says where tokens leave: `layer` of "fastv" for example.

    Attributes:
        scorer, scorer_args, selector, selector_args: as in `PruningPolicy`.
        keep: tokens that stay, a share of those that a sample had before the first stage, float in (0, 1], or a number,
            int >= 1. A share of 1.0 leaves the stage out; with any other "visual-exit" keeps none.

    Raises:
        PolicyError: a field has the wrong type or a value that is not allowed.

    Example:
        >>> Stage("fastv", {"layer": 8}, keep=0.1)
        Stage(scorer='fastv', scorer_args={'layer': 8}, selector=None, selector_args={}, keep=0.1)
    """

    scorer: str
    scorer_args: Mapping[str, Any] = field(default_factory=dict)
    selector: str | None = None
    selector_args: Mapping[str, Any] = field(default_factory=dict)
    keep: Budget = 0.5

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.keep, float):
            object.__setattr__(self, "keep", float(self.keep))  # numpy's float64 is a float, but has another repr
        for name in ("scorer_args", "selector_args"):
            object.__setattr__(self, name, frozen(name, getattr(self, name)))

    @property
    def everything(self) -> bool:
        """True if nothing leaves here: a share of 1.0."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def step(self) -> Step:
        """Build the method, with its budget."""
        return Step(build_method(self.scorer, self.scorer_args, self.selector, self.selector_args), self.keep)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in their JSON form."""
        return {part.name: getattr(self, part.name) for part in fields(self)} | {"keep": keep_to_json(self.keep)}

    @classmethod
    def from_dict(cls, values: Any) -> "Stage":
        """Return the stage with the fields that `to_dict` gave; `keep` may be a number as well.

        Raises:
            PolicyError: a field is unknown, missing or wrong.
        """
        known = [part.name for part in fields(cls)]
        if not isinstance(values, Mapping) or "scorer" not in values or not set(values) <= set(known):
            raise PolicyError(f"a stage is {values!r:.200}; it is a dictionary with scorer and {', '.join(known[1:])}.")
        if not isinstance(values["scorer"], str) or not isinstance(values.get("selector", ""), str | None):
            raise PolicyError(
                f"scorer and selector are names, got {values['scorer']!r:.200} and {values.get('selector')!r:.200}."
            )
        keep = values.get("keep", 0.5)
        return cls(**{**values, "keep": keep_from_json(keep) if isinstance(keep, Mapping) else keep})

    def with_keep(self, keep: int | float) -> "Stage":
        """Return the stage with another budget."""
        return replace(self, keep=keep)


OF_STAGES = ("then", *(part.name for part in fields(Stage)))
"""Fields of a policy that a file holds in its list "stages"."""


def with_first_stage(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a policy's file with the fields of its first stage, and the stages after it in "then".

    Raises:
        PolicyError: "stages" is no list of them, or what is of a stage stands beside them too.
    """
    if "stages" not in values:
        return dict(values)
    stages, twice = values["stages"], sorted(set(values) & set(OF_STAGES))
    if not isinstance(stages, list | tuple) or not stages or twice:
        beside = f", beside {', '.join(twice)}" if twice else ""
        raise PolicyError(
            f"stages is {stages!r:.200}{beside}; it is a list of at least one dictionary, with scorer, scorer_args, "
            "selector, selector_args and keep, which then stand nowhere else."
        )
    first, *later = map(Stage.from_dict, stages)
    own = {part.name: getattr(first, part.name) for part in fields(first)} | {"keep": keep_to_json(first.keep)}
    return {**{key: value for key, value in values.items() if key != "stages"}, **own, "then": later}


def keep_in_file(values: Any) -> Any:
    """Return the budget of the first stage in a policy's file, as it is written there; None: there is none."""
    if not isinstance(values, dict):
        return None
    stages = values.get("stages")
    first = stages[0] if isinstance(stages, list) and stages and isinstance(stages[0], dict) else values
    return first.get("keep", {"share": 0.5})
