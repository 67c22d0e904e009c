"""Records, while a user's own steps run unpruned, what is needed to answer their prompts again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from catp_lightning.answers import Answer, listening
from catp_lightning.calibration.replay import Replay
from catp_lightning.dropping import DecoderEntry, DecoderPrompt
from catp_lightning.errors import PruningError
from catp_lightning.families import Family
from catp_lightning.observation import Needs, Observation, Signal
from catp_lightning.observing import Observer


def refuse_unreplayable(family: Family) -> None:
    """Raise PruningError where a recorded prompt cannot be answered again exactly, or shows no cross-attention maps."""
    replayed = family.language_model.config.model_type == "opt"
    if Signal.CROSS_ATTENTION not in family.layers() or not replayed:
        raise PruningError(
            f"CrossAttentionCalibration reads the Q-Former of a BLIP-2 or InstructBLIP whose language model is OPT; "
            f"{type(family.model).__name__} with {type(family.decoder).__name__} has none of that kind. Prune it by a "
            "fixed rule, PruningPolicy(scorer=...); docs/families.md says which scorers it shows signals for."
        )


class Recorder:
    """Prompts at the entry of the language model, what their images showed, and the model's answers.

    Args:
        family: of the model.
        needs: the signals to observe.
    """

    def __init__(self, family: Family, needs: Needs) -> None:
        self.family = family
        self._observer = Observer(family, needs)
        self._entry = DecoderEntry(family, self._record, forget=self._observer.forget)
        self._prompts: list[tuple[DecoderPrompt, Observation]] = []
        self._answers: list[Answer] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        with self._observer.watching(), self._entry.dropping(), listening(self.family, self._answers.append):
            yield

    def _record(self, prompt: DecoderPrompt) -> Tensor:
        self._prompts.append((prompt, self._observer.take(prompt)))
        return prompt.tokens  # nothing is dropped: answers stay the usual ones

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[Replay, Observation]]]:
        """What was recorded since last time; nothing is while inside, so that it can be replayed.

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
        self._entry.active = self._observer.active = False
        try:
            pairs = zip(prompts, answers, strict=True)
            yield [(Replay.of(self.family, prompt, answer), seen) for (prompt, seen), answer in pairs]
        finally:
            self._entry.active = self._observer.active = True
