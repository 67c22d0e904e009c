"""`PruningPolicy`: a pruning decision, its model and its evidence, passed from calibration to use as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from catp_lightning.errors import PolicyError
from catp_lightning.methods.method import Method
from catp_lightning.methods.schedule import Step
from catp_lightning.methods.scorers import SCORERS, Scorer
from catp_lightning.methods.selectors import SELECTORS, Selector
from catp_lightning.policy.budgets import Budget, check_keep, check_price, keep_from_json
from catp_lightning.policy.building import (
    build_counted,
    build_method,
    build_routed,
    build_scorer,
    build_selector,
    named,
)
from catp_lightning.policy.frozen import DEEPEST, LARGEST, check_size, frozen, too_large
from catp_lightning.policy.schedules import stages_of
from catp_lightning.policy.stages import OF_STAGES, Stage, with_first_stage
from catp_lightning.policy.stored import Stored
from catp_lightning.policy.text import SHORT, short_text
from catp_lightning.utils.messages import warn

FORMAT_VERSION = 2

Positions = Literal["original", "compact"]


@dataclass(frozen=True)
class PruningPolicy(Stored):
    """Methods, budgets and settings by which visual tokens are pruned, with the evidence of a calibration.

    Tokens may leave at several places, one after the other: `scorer`, `selector` and `keep` are of the first stage, and
    `then` has those after it.

    Dictionaries are copied in their JSON form and frozen with all that they hold: checked values cannot change, and a
    policy that is saved and loaded is equal. `to_dict` gives plain dictionaries, which may be changed.

    Attributes:
        scorer: name of the method that scores tokens; it has a default selector.
        scorer_args: arguments of the scorer, checked against its typed fields.
        selector: name of the selector, "top-k" or "dpp" for example; None: the scorer's default.
        selector_args: arguments of the selector, checked likewise; `per` is the unit of the budget.
        keep: a share, float in (0, 1], or a number of tokens, int >= 1; rounded up, at least 1, at most all.
        then: the stages after the first, at ascending layers of the decoder. Their `keep` counts tokens that a sample
            had before the first stage. With any, `keep` 1.0 of a stage leaves that stage out.
        positions: "original" leaves every token its position id; "compact" renumbers the kept tokens.
        model: type, name and shape of the model that the policy was made for; None: any model that has the signals the
            scorer reads.
        routes: other rules, of which the question may choose one for each sample instead of `scorer` and `selector`:
            "rules", a list of dictionaries with `scorer`, `scorer_args`, `selector` and `selector_args`, and "router",
            the arguments of a `Router` for `scorer` and these rules in order; None: `scorer` is the only rule.
        budget: the price for which a calibration chose it, a share of what the unpruned model pays,
            {"prefill_flops": 0.25}; None: `keep` is the budget. Not used when pruning.
        evidence: findings of a calibration; not used when pruning.
        format_version: version of the file format; 2. Files of version 1 have one stage, and load.
        counts: arguments of `Counts`, by which samples keep more or fewer tokens than `keep`, as their question needs,
            and `keep` is the mean over samples like those of the calibration; None: all keep what `keep` says.

    Raises:
        PolicyError: a field has the wrong type or a value that is not allowed, or the fields together are larger than
            4 MiB.

    Example:
        >>> policy = PruningPolicy(scorer="catp", scorer_args={"layers": [0]}, keep=0.25)
        >>> PruningPolicy.from_dict(policy.to_dict()) == policy
        True
        >>> PruningPolicy("fastervlm", keep=0.5, then=[Stage("fastv", {"layer": 8}, keep=0.1)])
        PruningPolicy(scorer='fastervlm', keep=0.5, then=[fastv at 0.1])
    """

    scorer: str = "catp"
    scorer_args: Mapping[str, Any] = field(default_factory=dict)
    selector: str | None = None
    selector_args: Mapping[str, Any] = field(default_factory=dict)
    keep: Budget = 0.5
    positions: Positions = "original"
    model: Mapping[str, Any] | None = None
    routes: Mapping[str, Any] | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    then: Sequence[Stage] = ()
    budget: Mapping[str, float] | None = None
    counts: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.positions not in get_args(Positions):
            raise PolicyError(f"positions is {self.positions!r:.200}; allowed are {', '.join(get_args(Positions))}.")
        if isinstance(self.keep, float):
            object.__setattr__(self, "keep", float(self.keep))  # numpy's float64 is a float, but has another repr
        for name in ("scorer_args", "selector_args", "routes", "evidence", "model", "budget", "counts"):
            if getattr(self, name) is not None or name not in ("routes", "model", "budget", "counts"):
                object.__setattr__(self, name, frozen(name, getattr(self, name)))
        if self.budget is not None:
            check_price(self.budget)
        if not isinstance(self.then, list | tuple) or not all(isinstance(stage, Stage) for stage in self.then):
            raise PolicyError(f"then is {self.then!r:.200}; it is a list of Stage, those after the first.")
        object.__setattr__(self, "then", tuple(self.then))
        if type(self.format_version) is not int or not 1 <= self.format_version <= FORMAT_VERSION:
            raise PolicyError(
                f"format_version is {self.format_version!r:.200}; this version of catp-lightning has {FORMAT_VERSION}."
            )
        parts = [[stage.to_dict() for stage in self.stages], self.routes, self.evidence, self.model, self.counts]
        if len(json.dumps(parts)) > LARGEST - 1024:
            raise PolicyError(too_large("This policy"))
        self.steps()

    def build_scorer(self) -> Scorer:
        """Build the scorer with its arguments."""
        return build_scorer(self.scorer, self.scorer_args)

    def build_selector(self) -> Selector:
        """Build the selector with its arguments; without a name, the scorer's default selector."""
        return build_selector(self.scorer, self.selector, self.selector_args)

    def method(self) -> Method:
        """Build scorer and selector, with `routes` other rules and their router, with `counts` how many tokens stay."""
        first = build_method(self.scorer, self.scorer_args, self.selector, self.selector_args)
        found = first if self.routes is None else build_routed(first, self.routes)
        return found if self.counts is None else build_counted(found, self.counts)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages; `routes` belong to the first."""
        first = Stage(self.scorer, self.scorer_args, self.selector, self.selector_args, self.keep)
        return (first, *self.then)

    @property
    def everything(self) -> bool:
        """True if nothing is pruned: every stage keeps a share of 1.0."""
        return all(stage.everything for stage in self.stages)

    def steps(self) -> tuple[Step, ...]:
        """Build the methods of all stages with their budgets."""
        return (Step(self.method(), self.keep), *(stage.step() for stage in self.then))

    @classmethod
    def of(cls, scorer: Scorer, selector: Selector | None = None, **settings: Any) -> Self:
        """Return the policy of a method that is given as an object.

        Args:
            scorer: scores tokens; its class is one of `SCORERS`.
            selector: turns scores into a set of tokens; its class is one of `SELECTORS`. None: the scorer's default.
            settings: the other fields, `keep` for example.

        Raises:
            PolicyError: a class is in no registry, so that its name could not be written into a file; or as in the
                constructor.

        Example:
            >>> from catp_lightning.methods.scorers import FastV
            >>> PruningPolicy.of(FastV(layer=2), keep=0.25)
            PruningPolicy(scorer='fastv', keep=0.25)
        """
        name, scorer_args = named(SCORERS, scorer)
        settings = {**settings, "scorer": name, "scorer_args": scorer_args}
        if selector is not None:
            settings["selector"], settings["selector_args"] = named(SELECTORS, selector)
        return cls(**settings)

    @classmethod
    def schedule(cls, name: str, keep: float, depth: int, **settings: Any) -> Self:
        """Return the policy of a published method of several stages, "vscan" for example, with the other `settings`.

        A layer of the decoder, which has `depth`, reads a share `keep` of the visual tokens, the mean over its layers.

        Raises:
            PolicyError: `SCHEDULES` has no such method, or a value is not allowed.

        Example:
            >>> PruningPolicy.schedule("vscan", keep=0.25, depth=32)
            PruningPolicy(scorer='fastervlm', keep=0.375, selector='vscan', then=[fastv at 0.125])
        """
        first, *then = stages_of(name, keep, depth)
        return cls(**{**settings, **vars(first), "then": then})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types; what is of one stage is in the list "stages".

        `keep` of a stage is {"share": 1.0} or {"tokens": 1}, because JSON does not tell a float from an int.
        """
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.name not in OF_STAGES}
        values = {"stages": [stage.to_dict() for stage in self.stages], **values}
        return dict(json.loads(json.dumps(values, allow_nan=False)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the policy with the fields that `to_dict` gave.

        Unknown keys and a newer format version warn and are ignored.

        Raises:
            PolicyError: a value is wrong.
        """
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise PolicyError(f"a policy must be a dictionary with names as keys, got {SHORT.repr(values)}.")
        check_size("a policy", values, DEEPEST + 1)
        values = with_first_stage(values)
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            warn(
                f"The policy has keys this version of catp-lightning does not know: {', '.join(unknown):.200}. "
                "They are ignored.",
                stacklevel=2,
            )
        known = {key: value for key, value in values.items() if key in names}
        version = known.get("format_version", FORMAT_VERSION)
        if type(version) is int and version > FORMAT_VERSION:
            warn(
                f"The policy has format_version {version!r:.50}, this version of catp-lightning reads up to "
                f"{FORMAT_VERSION}: what its fields mean may have changed. Update catp-lightning, or calibrate again.",
                stacklevel=2,
            )
        if type(version) is int and version >= 1:
            known["format_version"] = FORMAT_VERSION
        if "keep" in known:
            known["keep"] = keep_from_json(known["keep"])
        if isinstance(known.get("then"), list | tuple):
            known["then"] = [stage if isinstance(stage, Stage) else Stage.from_dict(stage) for stage in known["then"]]
        if not isinstance(known.get("scorer", ""), str) or not isinstance(known.get("selector", ""), str | None):
            raise PolicyError(
                f"scorer and selector are names, got {known.get('scorer')!r:.200} and {known.get('selector')!r:.200}."
            )
        return cls(**known)

    def __repr__(self) -> str:
        """Short text: scorer, budget and fields that differ from their defaults; evidence and long values are cut."""
        return short_text(self)

    def with_keep(self, keep: int | float) -> Self:
        """Return a copy of the policy, which has one stage, with another budget.

        Raises:
            PolicyError: it has several stages, or `keep` is not allowed.
        """
        if self.then:
            raise PolicyError(
                f"The policy has {len(self.then) + 1} stages, each with a budget of its own: {self!r:.300}. Write them "
                "anew, dataclasses.replace(policy, keep=..., then=[...]), or calibrate for another budget."
            )
        evidence = {name: found for name, found in self.evidence.items() if name != "prices"}
        return replace(self, keep=keep, budget=None, evidence=evidence)  # it costs something else
