"""What tests of dropping inside T5's encoder share: the models, and the run in which the same tokens are masked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from catp_lightning.methods.observation import Needs
from catp_lightning.methods.selection import Selection
from catp_lightning.models import find_family
from catp_lightning.pruning.sites import PruneAtEncoderLayers, SiteSettings
from tests.support.families import BY_NAME
from tests.support.oracles import Inputs, columns_kept, hidden_in, hooked, of_rows
from tests.support.quick import quick

MODELS = [BY_NAME["Blip2-T5"], BY_NAME["InstructBlip-T5"]]
STAGES = [(1,), (2,), (1, 2), (0, 2), (0, 1, 2)]  # of three blocks
every_model = pytest.mark.parametrize("row", MODELS, ids=repr)
every_stage = pytest.mark.parametrize("stages", quick(STAGES, {"(1,)", "(0, 1, 2)"}))


def stages_of(
    model: PreTrainedModel, stages: tuple[int, ...], choose: Callable[[Any], Tensor], needs: Needs | None = None
) -> PruneAtEncoderLayers:
    decide = lambda prompt: Selection(choose(prompt))  # noqa: E731
    return PruneAtEncoderLayers(find_family(model), decide, SiteSettings(stages, needs or {}))


@contextmanager
def masked(model: Any, inputs: Inputs, stages: tuple[int, ...], keeps: list[Tensor]) -> Iterator[None]:
    """The full model: from a stage on blocks do not see what left there, nor does the decoder what left at the last."""
    text, columns = model.language_model, [columns_kept(inputs, keep) for keep in keeps]
    layers = [block.layer[0] for block in text.encoder.block]  # their arguments have names

    def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bias, at = kwargs["position_bias"], layers.index(layer)
        kept = columns[sum(stage <= at for stage in stages) - 1]
        kept = of_rows(kept, len(args[0]))
        gone = ~kept[:, None, None]
        if bias is None:  # block 0 makes it
            return {"attention_mask": hidden_in(kwargs["attention_mask"].expand(len(kept), -1, -1, -1), gone)}
        return {"position_bias": bias.expand(len(kept), -1, -1, -1).masked_fill(gone, torch.finfo(bias.dtype).min)}

    def hide_states(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        mask = kwargs["encoder_attention_mask"]
        return {"encoder_attention_mask": mask * of_rows(columns[-1], len(mask))}

    with hooked(layers[stages[0] :], hide), hooked([text.decoder], hide_states):
        yield
