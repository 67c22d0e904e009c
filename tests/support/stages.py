"""What tests of dropping inside the decoder share: deeper models, choices at a layer, and the masked run."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from catp_lightning.methods.observation import Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.models import find_family
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.pruning.sites import SiteSettings
from catp_lightning.pruning.sites.decoder_layers import PruneAtDecoderLayers
from catp_lightning.pruning.sites.stage_prompt import StagePrompt
from tests.support.decoder_oracle import Decoder
from tests.support.families import BY_NAME
from tests.support.matrix import STEPS, exact, generate, scale
from tests.support.oracles import CACHE, Inputs, columns_kept, hidden_in, hooked, of_rows
from tests.support.quick import quick
from tests.support.rows import Row

LAYERS = 4


def deeper(make: Callable[[], PreTrainedModel], layers: int = LAYERS) -> PreTrainedModel:
    """The same model with more decoder layers, by default four, so that tokens can leave several times."""
    model = make()
    text = model.config.get_text_config()
    before, text.num_hidden_layers = text.num_hidden_layers, layers
    for name, value in vars(text).items():  # lists with an entry for each layer
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, (value * layers)[: layers - 1] + value[-1:])
    return type(model)(model.config)


def deep(row: Row, layers: int = LAYERS) -> Row:
    return replace(row, make=functools.partial(deeper, row.make, layers))


def three_stages(row: Row) -> tuple[Row, tuple[int, ...]]:
    """Return the same row with a decoder in which tokens can leave at three places, and those.

    Where features are added to visual tokens after early layers, the places inside come after the last of them.
    """
    vision = getattr(row.model().config, "vision_config", None)
    first = len(getattr(vision, "deepstack_visual_indexes", None) or ()) or 1
    return deep(row, max(LAYERS, first + 2)), (0, first, max(LAYERS - 1, first + 1))


LLAMA, OPT, QWEN, MISTRAL, QUESTIONED = (
    deep(BY_NAME[name]) for name in ("Llava", "Blip2-OPT", "Qwen2.5-VL", "Mistral3", "InstructBlip")
)
WINDOWED = [deep(BY_NAME[name]) for name in ("Gemma3", "PaliGemma", "PaliGemma2", "Mistral3, sliding window")]
MODELS = [LLAMA, OPT, QWEN, MISTRAL, QUESTIONED, *WINDOWED]
STAGES = [(1,), (2,), (1, 3), (0, 2), (0, 1, 3)]
every_model = pytest.mark.parametrize(
    "row", quick(MODELS, {"Llava", "Blip2-OPT", "Qwen2.5-VL", "Gemma3", "PaliGemma2"})
)
# Qwen2.5-VL makes positions of a wrong shape where a mask is given to a decoding step without them, unpruned as well.
makes_positions = pytest.mark.parametrize("row", [row for row in MODELS if not row.coordinates], ids=repr)
every_stage = pytest.mark.parametrize("stages", STAGES, ids=str)
LATE, THREE = (1, 3), (0, 1, 3)


def schedules(rows: Sequence[Row], fast: Sequence[Row]) -> pytest.MarkDecorator:
    """Rows with the stages `LATE`, and with `THREE`: one of them slow, for some rows the former. The first has both."""
    return _product(rows, (LATE, THREE), lambda row, own: row is rows[0] or own == (THREE if row in fast else LATE))


COVERED = {LLAMA: STAGES, MISTRAL: [LATE], QUESTIONED: [LATE], WINDOWED[1]: [LATE]}
"""Stages of each model that are no slow test: all of one model, and of each other one `LATE`, or by default `THREE`."""


def covering(stages: Sequence[tuple[int, ...]]) -> pytest.MarkDecorator:
    """Every model with all of `stages`, which are slow but for `COVERED`."""
    return _product(MODELS, stages, lambda row, own: own in COVERED.get(row, [THREE]))


def _product(
    rows: Sequence[Row], stages: Sequence[tuple[int, ...]], fast: Callable[[Row, tuple[int, ...]], bool]
) -> pytest.MarkDecorator:
    """Every row with all of `stages`, slow where `fast` says no."""
    pairs = [(row, own) for row in rows for own in stages]
    params = [
        pytest.param(row, own, id=f"{row}, {own}", marks=() if fast(row, own) else pytest.mark.slow)
        for row, own in pairs
    ]
    return pytest.mark.parametrize(("row", "stages"), params)


every_schedule = covering([LATE, THREE])
every_model_and_stage = covering(STAGES)
LAST_ROW = {Signal.LAST_TOKEN_ATTENTION: (-1,)}


def model_of(row: Row, dtype: torch.dtype = torch.float64, attention: str | None = None) -> PreTrainedModel:
    return _model_of(row, dtype, attention or row.attention)  # one object, however its arguments are given


@functools.cache
def _model_of(row: Row, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    model = row.model(dtype, attention)
    if row is OPT:  # tokens that leave late must move its logits too
        for name, weight in stack_of(row, model).named_parameters():
            if "_attn" in name and weight.dim() == 2:
                weight.data *= 2.2
    return model


def stack_of(row: Row, model: PreTrainedModel) -> Any:
    assert isinstance(row.oracle, Decoder)
    return model.get_submodule(row.oracle.path)


@dataclass
class Uneven:
    """A choice that belongs to each sample and stage: other numbers, scattered; each of `keeps` is one choice made."""

    samples: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    keeps: list[Tensor] = field(default_factory=list)

    def __call__(self, prompt: StagePrompt) -> Tensor:
        order = torch.rand(4, 64, generator=torch.Generator().manual_seed(4))
        shares = torch.tensor([0.5, 0.8, 0.65, 0.4])
        own = torch.tensor(self.samples)[: len(prompt.tokens)]
        scores = order[own, : prompt.tokens.shape[1]].masked_fill(~prompt.tokens, -1.0)
        count = (prompt.tokens.sum(1) * shares[own]).floor()
        keep = scores.argsort(dim=1, descending=True, stable=True).argsort(1) < count[:, None]
        self.keeps.append(keep & prompt.tokens)
        return keep


@dataclass
class MostAttended:
    """FastV's choice, half of what is there at each stage; what was seen and kept at each.

    At the decoder's input, where no row has attended to anything, three tokens in four.
    """

    seen: list[StagePrompt] = field(default_factory=list)
    keeps: list[Tensor] = field(default_factory=list)

    def __call__(self, prompt: DecoderPrompt) -> Tensor:
        if not isinstance(prompt, StagePrompt):
            self.keeps.append(prompt.tokens & (prompt.tokens.cumsum(1) % 4 != 0))
            return self.keeps[-1]
        assert prompt.attention is not None
        scores = prompt.attention.mean(1).masked_fill(~prompt.tokens, -1.0)
        keep = (
            scores.argsort(dim=1, descending=True, stable=True).argsort(1)
            < (prompt.tokens.sum(1, keepdim=True) + 1) // 2
        )
        self.seen.append(prompt)
        self.keeps.append(keep & prompt.tokens)
        return keep


def stages_of(
    model: PreTrainedModel, stages: tuple[int, ...], choose: Callable[[Any], Tensor], observe: bool = False
) -> PruneAtDecoderLayers:
    decide = lambda prompt: Selection(choose(prompt))  # noqa: E731
    return PruneAtDecoderLayers(find_family(model), decide, SiteSettings(stages, LAST_ROW if observe else {}))


def chosen(inputs: Inputs, row: Row, stages: tuple[int, ...], samples: list[int] | None = None) -> list[Tensor]:
    """What stays after each stage, bool [B, T]: the choice made without a model."""
    tokens, keeps = row.oracle.tokens(inputs), []
    for _ in stages:
        prompt: Any = type("Prompt", (), {"tokens": tokens})
        tokens = tokens & Uneven(samples or [0, 1, 2, 3])(prompt)
        keeps.append(tokens)
    return keeps


@contextmanager
def masked(
    row: Row, model: PreTrainedModel, inputs: Inputs, stages: tuple[int, ...], keeps: list[Tensor]
) -> Iterator[None]:
    """The full model, of which each layer from a stage on does not see what left there."""
    layers = list(stack_of(row, model).layers)
    columns = [columns_kept(inputs, keep) for keep in keeps]

    def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        at, mask, cache = layers.index(layer), kwargs["attention_mask"], kwargs.get(CACHE)
        rows, queries = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        length = queries + (0 if cache is None else cache.get_seq_length(at))
        if mask is None:
            mask = torch.ones(1, 1, queries, length, dtype=torch.bool).tril(length - queries)
        kept = columns[sum(stage <= at for stage in stages) - 1]
        gone = torch.zeros(rows, length, dtype=torch.bool)
        gone[:, : kept.shape[1]] = ~of_rows(kept, rows)
        keys = torch.arange(length - mask.shape[-1], length)  # a sliding layer's cache holds the last columns
        others = torch.arange(length - queries, length)[:, None] != keys
        return {"attention_mask": hidden_in(mask, gone[:, None, None, keys] & others)}

    with hooked(layers[stages[0] :], hide):
        yield


def check_dropping(
    row: Row,
    model: PreTrainedModel,
    inputs: Inputs,
    stages: tuple[int, ...],
    moves: float,
    tolerance: float,
    count: int = STEPS,
) -> None:
    """Check that dropping at `stages` gives the logits of a run in which later layers do not see what was dropped.

    Args:
        row: the model's row.
        model: the model.
        inputs: a batch.
        stages: layers at whose entry tokens leave.
        moves: how far dropping moves logits at least, as a share of their scale, or this proves nothing.
        tolerance: how far logits may be apart, as a share of their scale.
        count: number of decoding steps.
    """
    full, keeps = model(**inputs).logits, chosen(inputs, row, stages)
    with stages_of(model, stages, Uneven()).installed():
        prefill = model(**inputs).logits
        tokens, steps = generate(row, model, inputs, count)
    with masked(row, model, inputs, stages, keeps):
        oracle = model(**inputs).logits
        oracle_tokens, oracle_steps = generate(row, model, inputs, count)
    rows, atol = row.oracle.compared(inputs, keeps[-1]), tolerance * scale(full)
    assert scale(oracle[rows] - full[rows]) > moves * scale(full), "dropping must move logits, or this proves nothing"
    exact(prefill[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
    assert torch.equal(tokens, oracle_tokens)


@contextmanager
def given_to(row: Row, model: PreTrainedModel) -> Iterator[list[list[dict[str, Any]]]]:
    """What each layer is called with, by name, at each call: entered after dropping, it sees what that changed."""
    layers = list(stack_of(row, model).layers)
    calls: list[list[dict[str, Any]]] = [[] for _ in layers]

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        calls[layers.index(layer)].append(kwargs)
        return {}

    with hooked(layers, see):
        yield calls
