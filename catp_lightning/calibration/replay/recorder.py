"""Record, while a user's own steps run unpruned, what is needed to answer their prompts again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.replay.cross_attention import CrossAttentionReplay
from catp_lightning.calibration.replay.decoder import DecoderReplay
from catp_lightning.calibration.replay.encoder import EncoderReplay
from catp_lightning.calibration.replay.groups import Groups
from catp_lightning.calibration.replay.perturber import Perturber
from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.prompt.prompt import Prompt
from catp_lightning.pruning.answers import Answer, listening
from catp_lightning.pruning.beside import observed
from catp_lightning.pruning.observer import Observer
from catp_lightning.pruning.sites import PruningSite, SiteSettings, site_of

Recorded = tuple[Replay, Observation, Observation | None, Groups | None]

REPLAYS: tuple[type[Replay], ...] = (DecoderReplay, EncoderReplay, CrossAttentionReplay)
"""Replays, one file each, by the places whose prompts they answer again."""


class Recorder:
    """Recorder of prompts where tokens would leave, of the signals of their images, and of the model's answers.

    Args:
        plan: plan of the calibration, with the model's family.
        needs: signals to observe before the decoder.

    Attributes:
        active: True while calls of the model are recorded; False: they are ignored.
        perturber: perturbs the images that the model reads, while a copy of a batch is answered.
        again: positional and named arguments of the user's last step, to run it again; None: it need not.
    """

    def __init__(self, plan: Plan, needs: Needs) -> None:
        self.plan = plan
        inside: Needs = plan.needs_inside | (
            {Signal.CROSS_ATTENTION_TO_IMAGE: None} if Signal.CROSS_ATTENTION_TO_IMAGE in needs else {}
        )
        stages = (plan.layer,) if plan.layer else ()
        self._site = site_of(plan.family, self._record, SiteSettings(stages, inside))
        self._observer = Observer(plan.family, observed(needs), self._site.calls)
        self._replay = _replay_of(self._site)
        self.perturber = Perturber(plan)
        self.again: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._prompts: list[tuple[Prompt, Observation | None]] = []  # None: a prompt without images
        self._answers: list[Answer] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        with (
            self._observer.watching(),
            self._site.installed(),
            listening(self.plan.family, self._answers.append, active=lambda: self.active),
            self.perturber.watching(),
        ):
            yield

    @property
    def active(self) -> bool:
        return self._site.active

    @active.setter
    def active(self, active: bool) -> None:
        self._site.active = self._observer.active = active

    def _record(self, prompt: Prompt) -> Selection:
        seen = None
        if prompt.tokens.any():
            seen = self._observer.take(prompt)
            for model in self.plan.beside:
                seen = model.add(seen, prompt)
        self._prompts.append((prompt, seen))
        return Selection(prompt.tokens)  # nothing is dropped: answers stay the usual ones

    @contextmanager
    def recorded(self, groups: Groups | None = None) -> Iterator[list[Recorded]]:
        """Yield what was recorded since the last time; nothing is recorded while inside, so that it can be replayed.

        Prompts without visual tokens are left out.

        Args:
            groups: groups of all samples since then, in the order in which the model was asked about them.

        Raises:
            PruningError: prompts reached the language model past the model's own generate and forward, or there are
                not as many groups as samples.
        """
        prompts, answers = list(self._prompts), list(self._answers)
        self._prompts.clear()
        self._answers.clear()
        if len(prompts) != len(answers):
            raise PruningError(
                f"The step sent {len(prompts)} prompts to the language model but got {len(answers)} answers from the "
                "model's own generate or forward. Call those, not its language model's."
            )
        each: list[Groups | None] = [None] * len(prompts)
        if groups is not None and prompts:
            each = [*groups.split([len(prompt.tokens) for prompt, _ in prompts])]
        before, self.active = self.active, False
        try:
            found = [
                self._recorded(prompt, seen, answer, of)
                for (prompt, seen), answer, of in zip(prompts, answers, each, strict=True)
                if seen is not None
            ]
            prompts.clear()  # they refer to the keys and values of the whole answer
            yield found
        finally:
            self.active = before

    def _recorded(self, prompt: Prompt, seen: Observation, answer: Answer, groups: Groups | None) -> Recorded:
        replay = self._replay.of(self.plan.family, prompt, answer, self.plan.layer)
        return replay, seen, prompt.observation(), groups


def _replay_of(site: PruningSite) -> type[Replay]:
    """Return the class that answers a place's prompts again.

    Raises:
        PruningError: there is none.
    """
    for replay in REPLAYS:
        if isinstance(site, replay.sites):
            return replay
    raise PruningError(
        f"Prompts of {type(site).__name__} cannot be answered again, so methods that drop tokens there cannot be "
        "calibrated. Prune by a fixed rule, PruningPolicy(scorer=...)."
    )
