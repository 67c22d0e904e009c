"""What a scorer is shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy, prune
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers import Scorer
from tests.support.oracles import IMAGE, VIDEO

READ_AND_TEXT: Needs = {Signal.IMAGE_EMBEDS: None, Signal.TEXT_EMBEDS: None}
SETTINGS = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}


@dataclass(frozen=True)
class Notes(Scorer):
    """Keeps what it is shown and ranks nothing."""

    wanted: ClassVar[Needs] = {}
    seen: ClassVar[list[Observation]] = []

    @property
    def needs(self) -> Needs:
        return self.wanted

    def score(self, seen: Observation) -> Tensor:
        self.seen.append(seen)
        return torch.zeros(seen.images, seen.tokens)


def observed(needs: Needs, model: PreTrainedModel, inputs: Mapping[str, Any], **settings: Any) -> list[Observation]:
    """What one call shows: of forward, or with settings of generate, which may show several prefills."""
    Notes.seen, Notes.wanted = [], needs
    with prune(model, PruningPolicy(scorer="position", keep=0.5)):
        (model.generate if settings else model)(**inputs, **settings)
    return Notes.seen
