"""A candidate of a calibration: a named rule, a scorer and a selector without a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from catp_lightning.calibration.fit.fitting import rounded
from catp_lightning.methods.components import Question
from catp_lightning.methods.method import Method
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.building import DEEP, RULE, build_method


@dataclass(frozen=True)
class Candidate:
    """Pruning rule without its budget.

    Attributes:
        name: unique name; ties are broken by it.
        control: True for a control, which a finding has to beat: it reads no attention, or uses diversity alone.
        reference: True if it is checked beside the chosen policy, whatever its rank: controls, and single layers (of a
            Q-Former: CATP's).
        eligible: True if it may be chosen; when one method is calibrated, controls are only compared with it.
    """

    name: str
    scorer: str
    scorer_args: Mapping[str, Any] = field(default_factory=dict)
    selector: str | None = None
    selector_args: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False
    reference: bool = False
    eligible: bool = True

    def policy(self, keep: int | float) -> PruningPolicy:
        return PruningPolicy(self.scorer, self.scorer_args, self.selector, self.selector_args, keep)

    @cached_property
    def method(self) -> Method:
        """The rule itself, built once: checking its arguments takes longer than answering a small batch."""
        return build_method(self.scorer, self.scorer_args, self.selector, self.selector_args)

    @property
    def fitted(self) -> int:
        """0 for a rule as published and for diversity alone, 1 for a rule with a chosen setting, 2 for a fitted one."""
        if not {"head_weights", "slot_weights", "weights", "network"}.isdisjoint(self.scorer_args):
            return 2
        return int(bool(self.scorer_args) or bool(self.selector_args.get("relevance")))

    @property
    def inside(self) -> bool:
        """True if tokens leave inside the decoder as well as, or instead of, at its input."""
        return bool(self.method.scorer.stages(DEEP))

    @property
    def alone(self) -> bool:
        """True for a rule inside the decoder that is one stage of a schedule elsewhere."""
        return False

    @property
    def routable(self) -> bool:
        """True if questions can be routed to the rule: no tokens are merged, and all leave at the decoder's input."""
        return not self.method.selector.merges and not self.inside

    @property
    def reversed(self) -> bool:
        """True if tokens with low scores are preferred."""
        return bool(self.selector_args.get("relevance", 0) < 0)


@dataclass(frozen=True)
class Exit(Candidate):
    """Rule that drops all visual tokens at one decoder layer (2405.05803).

    A budget is the share of the decoder's layers that read them, rounded up.

    Attributes:
        depth: number of layers of the decoder.
    """

    depth: int = 2

    def policy(self, keep: int | float) -> PruningPolicy:
        layer = max(1, min(self.depth - 1, math.ceil(keep * self.depth - 1e-9)))
        return PruningPolicy(self.scorer, {**self.scorer_args, "layer": layer}, self.selector, self.selector_args, keep)

    @cached_property
    def method(self) -> Method:
        """The rule with all of its layers."""
        return self.policy(1.0).method()


@dataclass(frozen=True)
class Routing(Candidate):
    """Several rules, of which the question takes one.

    Attributes:
        others: the rules beside the first, which is the candidate's own.
        router: arguments of the policy's router.
    """

    others: tuple[Candidate, ...] = ()
    router: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, members: Sequence[Candidate], question: Question, weights: np.ndarray) -> "Routing":
        """Return the routing between `members` whose expected divergences have these weights: float64 [C + 1, R]."""
        first, *others = members
        router = {"question": asdict(question), "divergence": [rounded(column) for column in weights.T]}
        name = f"by question: {' / '.join(member.name for member in members)}"
        rule = (first.scorer, first.scorer_args, first.selector, first.selector_args)
        return cls(name, *rule, others=tuple(others), router=router)

    def policy(self, keep: int | float) -> PruningPolicy:
        rules = [{name: getattr(other, name) for name in RULE} for other in self.others]
        return replace(super().policy(keep), routes={"rules": rules, "router": self.router})

    @cached_property
    def method(self) -> Method:
        """The rules with their router."""
        return self.policy(1.0).method()

    @property
    def fitted(self) -> int:
        return 2


@dataclass(frozen=True)
class Counting(Candidate):
    """Another candidate's rule, under which samples keep different numbers of tokens, by their questions.

    Attributes:
        rule: the other candidate.
        counts: arguments of the policy's `counts`.
    """

    rule: Candidate | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rule: Candidate, question: Question, weights: np.ndarray) -> "Counting":
        """Return the candidate with these weights of `Counts`: float64 [C + 1]."""
        counts = {"question": asdict(question), "weights": rounded(weights)}
        name = f"{rule.name}, counts by question"
        own = (rule.scorer, rule.scorer_args, rule.selector, rule.selector_args)
        return cls(name, *own, rule=rule, counts=counts)

    def policy(self, keep: int | float) -> PruningPolicy:
        assert self.rule is not None
        return replace(self.rule.policy(keep), counts=self.counts)

    @cached_property
    def method(self) -> Method:
        """The rule with its counts."""
        return self.policy(1.0).method()

    @property
    def fitted(self) -> int:
        return 2
