"""What tests of merging inside the decoder share: a choice that merges, and the full run with the means written in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.methods.selection import Selection
from catp_lightning.models import find_family
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.pruning.sites import SiteSettings
from catp_lightning.pruning.sites.decoder_layers import PruneAtDecoderLayers
from tests.support.matrix import STEPS, exact, generate, scale
from tests.support.merging import with_means
from tests.support.oracles import Inputs, hooked, visual_columns
from tests.support.rows import Row
from tests.support.stages import Uneven, chosen, masked, stack_of


@dataclass
class Merging:
    """Uneven's choice; every third token that leaves is lost, others are carried by one that stays, not the nearest."""

    uneven: Uneven = field(default_factory=Uneven)
    destination: Tensor | None = None

    def __call__(self, prompt: DecoderPrompt) -> Selection:
        keep = self.uneven(prompt) & prompt.tokens
        self.destination = torch.tensor(carried_by_hand(keep.tolist(), prompt.tokens.tolist()))
        return Selection(keep, self.destination)


def carried_by_hand(keep: list[list[bool]], tokens: list[list[bool]]) -> list[list[int]]:
    """For each token the one that carries it, -1 for none."""
    rows = []
    for kept, there in zip(keep, tokens, strict=True):
        stay = [place for place, stays in enumerate(kept) if stays]
        row = []
        for place in range(len(kept)):
            gone = there[place] and not kept[place]
            row.append(place if kept[place] else stay[7 * place % len(stay)] if gone and stay and place % 3 else -1)
        rows.append(row)
    return rows


def carriers_of(inputs: Inputs, row: Row, keeps: list[Tensor]) -> list[list[list[int]]]:
    there = [row.oracle.tokens(inputs), *keeps]
    return [carried_by_hand(keep.tolist(), before.tolist()) for keep, before in zip(keeps, there, strict=False)]


@contextmanager
def written(
    row: Row, model: nn.Module, inputs: Inputs, stages: tuple[int, ...], carriers: list[list[list[int]]]
) -> Iterator[None]:
    """The full model; where a stage's layer reads the prompt, means stand in the places of the tokens that carry.

    At stage 0 they are means of what the decoder is given, as features that are added after early layers are.
    """
    visual = [columns.nonzero()[:, 0].tolist() for columns in visual_columns(inputs)]
    length = inputs["input_ids"].shape[1]

    def write(stage: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] < length:  # a decoding step
            return args, kwargs
        changed, beams = hidden.clone(), len(hidden) // len(visual)
        for place in range(len(hidden)):
            own = carriers[stage][place // beams]
            for leader in {carrier for carrier in own if carrier >= 0}:
                columns = [visual[place // beams][token] for token, carrier in enumerate(own) if carrier == leader]
                changed[place, visual[place // beams][leader]] = sum(hidden[place, at] for at in columns) / len(columns)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def give(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("inputs_embeds") is None or kwargs["inputs_embeds"].shape[1] < length:
            return {}
        return with_means(kwargs, visual_columns(inputs), torch.tensor(carriers[0]))

    with ExitStack() as undo:
        if stages[0] == 0:
            undo.enter_context(hooked([stack_of(row, model)], give))  # type: ignore[arg-type]
        for stage, at in enumerate(stages):
            if at == 0:
                continue
            hook = lambda module, args, kwargs, stage=stage: write(stage, args, kwargs)  # noqa: E731
            layer = stack_of(row, model).layers[at]  # type: ignore[arg-type]
            undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def merging(model: Any, stages: tuple[int, ...], choose: Merging) -> PruneAtDecoderLayers:
    return PruneAtDecoderLayers(find_family(model), choose, SiteSettings(stages))


def check_merging(
    row: Row, model: Any, inputs: Inputs, stages: tuple[int, ...], tolerance: float, count: int = STEPS
) -> None:
    """Check that merging at `stages` gives the logits of the full run with the means written in and the rest masked."""
    keeps = chosen(inputs, row, stages)
    carriers = carriers_of(inputs, row, keeps)
    merged = [[own for own in sample if own >= 0] for sample in carriers[-1]]
    assert any(len(own) > len({*own}) for own in merged), "something is carried at the last stage"
    with merging(model, stages, choose := Merging()).installed():
        prefill = model(**inputs).logits
        tokens, steps = generate(row, model, inputs, count)
    assert choose.destination is not None and choose.destination.tolist() == carriers[-1]
    with masked(row, model, inputs, stages, keeps):
        dropped = model(**inputs).logits
        with written(row, model, inputs, stages, carriers):
            oracle = model(**inputs).logits
            oracle_tokens, oracle_steps = generate(row, model, inputs, count)
    rows, atol = row.oracle.compared(inputs, keeps[-1]), tolerance * scale(dropped)
    assert scale(oracle[rows] - dropped[rows]) > 0.01 * scale(dropped), "means must move logits, or this proves nothing"
    exact(prefill[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)
