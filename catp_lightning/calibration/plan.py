"""Plan of a calibration: choose among all methods that drop before the decoder, or among one method's settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from catp_lightning.calibration.perturbations import Perturbation
from catp_lightning.calibration.settings import DEFAULTS, CalibrationSettings
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.methods.observation import BY_LAYER, Needs, Signal, join
from catp_lightning.methods.scorers import SCORERS, AttentionScorer, Scorer
from catp_lightning.models import Family
from catp_lightning.policy import PruningPolicy
from catp_lightning.pricing import PrefillProfile
from catp_lightning.pruning.beside import reading
from catp_lightning.pruning.guide import Guide
from catp_lightning.pruning.pruner import Pruner, instead_of
from catp_lightning.pruning.text_tower import TextTower

OF_HEADS = BY_LAYER - {Signal.VISION_KEYS}


@dataclass(frozen=True)
class Plan:
    """Scorers that a calibration fits, and where it drops tokens meanwhile.

    Attributes:
        family: family of the model.
        method: the one method that is calibrated; None: all methods that drop before the decoder compete.
        scorers: scorers whose head weights are fitted, by name, with all the layers they may read.
        layer: decoder layer at whose entry tokens leave; 0: before the first layer.
        beside: models beside the family's that the method reads.
        settings: settings that trade time for precision.
        perturbations: perturbations of images by name; copies of every sample on perturbed images are measured too.
        largest: number of visual tokens of the largest image; None until it is known.
        unit: what budgets are paid in, one of `policy.UNITS`; None: they are shares or numbers of tokens that stay.
        profile: seconds of the prefill, for budgets in them; None: not measured.
    """

    family: Family
    scorers: Mapping[str, AttentionScorer]
    method: PruningPolicy | None = None
    layer: int = 0
    beside: Sequence[Guide | TextTower] = ()
    settings: CalibrationSettings = DEFAULTS
    perturbations: Mapping[str, Perturbation] = field(default_factory=dict)
    largest: int | None = None
    unit: str | None = None
    profile: PrefillProfile | None = None

    @classmethod
    def of(
        cls,
        family: Family,
        method: PruningPolicy | None = None,
        guide: nn.Module | None = None,
        settings: CalibrationSettings = DEFAULTS,
    ) -> "Plan":
        """Plan the calibration of all methods that drop before the decoder, or of one `method`.

        Raises:
            PruningError: the method does not run on the model.
        """
        if method is not None:
            return cls._of_method(family, method, guide, settings)
        scorers = {name: scorer for name, scorer in _fitted() if family.shows(scorer.needs)}
        return cls(family, scorers, settings=settings)

    @classmethod
    def _of_method(
        cls, family: Family, method: PruningPolicy, guide: nn.Module | None, settings: CalibrationSettings
    ) -> "Plan":
        refusal = why_not(family, method.with_keep(0.5), guide)
        if refusal is not None:
            raise PruningError(f"{method.scorer!r} cannot be calibrated here. {refusal}{instead_of(method, family)}")
        scorer = method.build_scorer()
        beside = reading(family, scorer, dict.fromkeys(scorer.needs), guide)  # of a guide all layers
        stages = scorer.stages(family.depth)
        plain = cls(family, {}, method, stages[0] if stages else 0, beside, settings)
        fitted = everything_it_reads(plain, scorer, method.selector, stages)
        return plain if fitted is None else replace(plain, scorers={method.scorer: fitted})

    @property
    def guide(self) -> Guide | None:
        """Guide that the method reads; None if it reads none."""
        return next((model for model in self.beside if isinstance(model, Guide)), None)

    @property
    def asks(self) -> bool:
        """True if methods that know the question compete: not where one named method is calibrated."""
        return self.method is None and self.family.shows({Signal.QUESTION})

    @property
    def slots(self) -> int:
        """Number of slots, places of an image's tokens with a meaning of their own: a Q-Former's queries; 0: none."""
        own = Signal.CROSS_ATTENTION in self.family.layers() and self.layer == 0
        own = own and (self.method is None or bool(self.scorers))  # slots alone are no setting of a method
        return (self.family.tokens_per_image or 0) if own else 0

    def layers_read(self, name: str) -> list[int]:
        """Return the layers that a scorer reads."""
        layers = self.scorers[name].layers
        return list(range(self.count(_signal(self.scorers[name]))) if layers is None else layers)

    def count(self, signal: Signal) -> int:
        """Return the number of layers that a signal has before the decoder."""
        return (
            self.guide.depth
            if signal is Signal.GUIDE_ATTENTION and self.guide is not None
            else self.family.layers()[signal]
        )

    def heads(self, name: str) -> int:
        """Return the number of heads in each layer that a scorer reads."""
        signal = _signal(self.scorers[name])
        return (self.guide.family if signal is Signal.GUIDE_ATTENTION and self.guide else self.family).heads(signal)

    @property
    def needs(self) -> Needs:
        """Signals that these scorers read before the decoder."""
        return {} if self.layer else join(scorer.needs for scorer in self.scorers.values())

    @property
    def needs_inside(self) -> dict[Signal, tuple[int, ...] | None]:
        """Signals that these scorers read inside the decoder."""
        return join(scorer.needs for scorer in self.scorers.values()) if self.layer else {}


def _fitted() -> Iterator[tuple[str, AttentionScorer]]:
    """Yield name and scorer of each method whose heads are fitted by default: of all layers, without weights."""
    for name, scorer in SCORERS.usable():
        if issubclass(scorer, AttentionScorer) and vars(scorer).get("fitted", False):
            yield name, _unweighted(scorer(), None)


def _unweighted(scorer: AttentionScorer, layers: tuple[int, ...] | None) -> AttentionScorer:
    """Return a scorer without weights, on the scale on which weights are fitted, that reads `layers`; None: all."""
    scale = {"scale": "log"} if any(field.name == "scale" for field in fields(scorer)) else {}
    changes: dict[str, Any] = {"layers": layers, "head_weights": None, "slot_weights": None, **scale}
    return replace(scorer, **changes)


def everything_it_reads(
    plan: Plan, scorer: Scorer, selector: str | None, stages: tuple[int, ...]
) -> AttentionScorer | None:
    """Return a scorer with every layer that it can read and without weights; None if it has no weights to fit.

    A method with several stages has none: each stage reads other heads, and weights of one say nothing about the next.
    """
    if not isinstance(scorer, AttentionScorer) or len(stages) > 1:
        return None
    if scorer.selector == "union" and selector in (None, "union"):  # each head picks by itself
        return None
    if scorer.needs.keys().isdisjoint(OF_HEADS):
        return None
    signal = _signal(scorer)
    count = stages[0] if stages else plan.count(signal)
    if stages and scorer.needs.keys() != {Signal.LAST_TOKEN_ATTENTION}:
        return None
    try:
        return _unweighted(scorer, tuple(range(count)))
    except ValueError:  # its layers are fixed
        return None


def _signal(scorer: Scorer) -> Signal:
    """Return the signal whose heads a scorer weighs."""
    return next(signal for signal in scorer.needs if signal in OF_HEADS)


def why_not(family: Family, policy: PruningPolicy, guide: nn.Module | None = None) -> str | None:
    """Return the reason why a policy cannot prune this model; None if it can."""
    try:
        Pruner(family, policy, guide=guide)
    except (PruningError, PolicyError) as error:
        return str(error)
    return None


def check_exit(budgets: Sequence[int | float], args: Mapping[str, Any]) -> None:
    """Raise PolicyError if a calibration of visual exit is given the layer, which it has to find, or token budgets."""
    if "layer" in args or not all(isinstance(keep, float) for keep in budgets):
        raise PolicyError(
            f"visual-exit is calibrated with keep {list(budgets)} and scorer_args {dict(args)}: its budgets are shares "
            "of the decoder's layers that read visual tokens, floats in (0, 1], and give the layer; leave `layer` out. "
            "max_disagreement finds the first layer at which they may leave."
        )
