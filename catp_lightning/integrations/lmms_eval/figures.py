"""What lmms-eval's results say of a pruned run: tokens kept, seconds of prefills, calibration images met."""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchmetrics import MeanMetric

from catp_lightning.errors import PruningError
from catp_lightning.metrics import TokensKept
from catp_lightning.metrics.overlap import overlap_check
from catp_lightning.models import Family, find_family
from catp_lightning.policy import PruningPolicy
from catp_lightning.pricing.parts import Clock
from catp_lightning.pruning.pruner import applied
from catp_lightning.pruning.record import Prefill
from catp_lightning.utils.hooks import hooked, replaced


class Figures:
    """Figures of the model calls of one process; nothing waits for other processes, which may have nothing to answer.

    Args:
        family: family of the model.
        policy: the policy that prunes it.
    """

    def __init__(self, family: Family, policy: PruningPolicy) -> None:
        self.clock = Clock(family.model)
        device = next(family.model.parameters()).device
        self.tokens, self.per_layer = TokensKept(), MeanMetric(sync_on_compute=False).to(device)
        self.tokens.sync_on_compute = False
        self.overlap = overlap_check(policy, device, alone=True)
        self.refused: PruningError | None = None
        self._start: Any = None
        self._read = False
        self._prefills: list[tuple[Any, Any]] = []

    def prefill(self, prefill: Prefill) -> None:
        """Add a prefill."""
        self.tokens.update(prefill.keep, prefill.counts)
        self.per_layer.update(prefill.tokens_per_layer.to(self.per_layer.device))
        if self.overlap is not None and prefill.images is not None:
            self.overlap.see([prefill.images])
        self._read = True

    def enter(self, *_: Any) -> None:
        """Hook before the part of the language model that reads visual tokens."""
        self._read, self._start = False, self.clock.mark()

    def leave(self, *_: Any) -> None:
        """Hook after it: calls that read a prompt are timed, choosing included."""
        if self._read:
            self._prefills.append((self._start, self.clock.mark()))

    def generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `generate`, and keep a refusal: some of lmms-eval's models answer nothing and go on after any error."""
        try:
            return generate(*args, **kwargs)
        except PruningError as error:
            self.refused = self.refused or error
            raise

    def compute(self) -> dict[str, float]:
        """Return the figures by name; without tokens kept if no image was read."""
        found = {f"catp/{name}": float(value) for name, value in self.tokens.compute().items()}
        if math.isnan(found["catp/keep_share"]):
            return {}
        if not math.isclose(per_layer := float(self.per_layer.compute()), found["catp/tokens_kept"], rel_tol=1e-6):
            found["catp/tokens_per_layer"] = per_layer
        if self._prefills:
            found["catp/seconds_prefill"] = statistics.median(self.clock.seconds(*both) for both in self._prefills)
        if self.overlap is not None:
            found["catp/calibration_images"] = float(self.overlap.met())
        return found


@contextmanager
def counted(module: Any, policy: PruningPolicy, figures: Figures | None = None) -> Iterator[Figures]:
    """Prune a model while inside, as `prune`, and count; in `figures` of earlier times, where they are given.

    Raises:
        PolicyError, PruningError: as in `prune`; a call inside was refused, whatever became of that error.
    """
    family = find_family(module)
    figures = Figures(family, policy) if figures is None else figures
    with (
        hooked(family.decoder, before=figures.enter),
        applied(module, policy, on_prefill=figures.prefill),
        hooked(family.decoder, after=figures.leave),
        replaced(family.model, "generate", figures.generate),
    ):
        yield figures
    if figures.refused is not None:
        raise figures.refused
