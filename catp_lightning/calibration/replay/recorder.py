"""Record, while a user's own steps run unpruned, what is needed to answer their prompts again."""

from collections.abc import Iterator
from contextlib import contextmanager

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import Replay
from catp_lightning.calibration.replay.cross_attention import RowsReplay
from catp_lightning.calibration.replay.decoder import DecoderReplay
from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.pruning.answers import Answer, listening
from catp_lightning.pruning.observer import Observer
from catp_lightning.pruning.sites import CrossAttended, DecoderPrompt, Prompt, StagePrompt, entry

Recorded = tuple[Replay, Observation, Observation | None]


class Recorder:
    """Recorder of prompts where tokens would leave, of the signals of their images, and of the model's answers.

    Args:
        plan: plan of the calibration, with the model's family.
        needs: signals to observe before the decoder.

    Attributes:
        active: True while calls of the model are recorded; False: they are ignored.
    """

    def __init__(self, plan: Plan, needs: Needs) -> None:
        self.plan = plan
        self._observer = Observer(
            plan.family, {key: layers for key, layers in needs.items() if key is not Signal.GUIDE_ATTENTION}
        )
        inside: Needs = plan.needs_inside | (
            {Signal.CROSS_ATTENTION_TO_IMAGE: None} if Signal.CROSS_ATTENTION_TO_IMAGE in needs else {}
        )
        stages = (plan.layer,) if plan.layer else ()
        self._entry = entry(plan.family, self._record, False, self._forget, stages, inside)
        self._prompts: list[tuple[Prompt, Observation | None]] = []  # None: a prompt without images
        self._answers: list[Answer] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        with (
            self._observer.watching(),
            self._entry.dropping(),
            listening(self.plan.family, self._answers.append, active=lambda: self.active),
        ):
            yield

    @property
    def active(self) -> bool:
        return self._entry.active

    @active.setter
    def active(self, active: bool) -> None:
        self._entry.active = self._observer.active = active

    def _forget(self) -> None:
        self._observer.forget()
        if self.plan.guide is not None:
            self.plan.guide.forget()

    def _record(self, prompt: Prompt) -> Selection:
        seen = self._observer.take(prompt) if prompt.tokens.any() else None
        if seen is not None and self.plan.guide is not None and isinstance(prompt, DecoderPrompt):
            seen = self.plan.guide.add(seen, prompt)
        self._prompts.append((prompt, seen))
        return Selection(prompt.tokens)  # nothing is dropped: answers stay the usual ones

    @contextmanager
    def recorded(self) -> Iterator[list[Recorded]]:
        """Yield what was recorded since the last time; nothing is recorded while inside, so that it can be replayed.

        Prompts without visual tokens are left out.

        Raises:
            PruningError: prompts reached the language model past the model's own generate and forward.
        """
        prompts, answers = list(self._prompts), list(self._answers)
        self._prompts.clear()
        self._answers.clear()
        if len(prompts) != len(answers):
            raise PruningError(
                f"The step sent {len(prompts)} prompts to the language model but got {len(answers)} answers from the "
                "model's own generate or forward. Call those, not its language model's."
            )
        before, self.active = self.active, False
        try:
            pairs = zip(prompts, answers, strict=True)
            yield [self._recorded(prompt, seen, answer) for (prompt, seen), answer in pairs if seen is not None]
        finally:
            self.active = before

    def _recorded(self, prompt: Prompt, seen: Observation, answer: Answer) -> Recorded:
        family = self.plan.family
        if isinstance(prompt, CrossAttended):
            return RowsReplay.of(family, prompt, answer), seen, None
        assert isinstance(prompt, DecoderPrompt)
        inside = prompt.observation() if isinstance(prompt, StagePrompt) else None
        return DecoderReplay.of(family, prompt, answer, self.plan.layer), seen, inside
