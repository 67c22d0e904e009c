"""Prefills of pruned runs against floor runs: the plain decoder on rows that are already as few, layer by layer."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead import median_interval
from catp_lightning import PolicyError, PruningError, PruningPolicy
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.models import Family, find_family
from catp_lightning.pricing import Prices, Prompts
from catp_lightning.pricing.parts import Parts, PartTimer
from catp_lightning.pruning.pruner import Pruner, applied
from catp_lightning.pruning.record import Prefill
from catp_lightning.utils.hooks import hooked

LEAST = 3
PLAIN = "unpruned"
CHOSEN = {
    "diversity (dpp)": ("position", "dpp", {"similarity": "outputs", "relevance": 0.0}),
    "coverage (facility location)": ("position", "facility-location", {"distance": "euclidean"}),
}
"""Scorer, selector and its arguments of sets that calibration takes on a LLaVA, beside registered methods."""


def policies(family: Family, keep: float) -> tuple[dict[str, PruningPolicy], dict[str, str]]:
    """Return every registered method that needs nothing from outside, and why others are left out, by name.

    With them `CHOSEN`, which a calibrated policy is made of.
    """
    found, left_out = {}, {}
    for name in SCORERS:
        few = name == "sparsevlm" and family.depth < 16  # layers 2, 6 and 15 of 32 would be 0, or one twice
        policy = PruningPolicy(name, {"stages_at": [1, 2, max(3, family.depth // 2)]} if few else {}, keep=keep)
        try:
            Pruner(family, policy)
        except (PolicyError, PruningError) as error:
            left_out[name] = str(error).split(". ")[0][:200]
        else:
            found[name] = policy
    for name, (scorer, selector, settings) in CHOSEN.items():
        found[name] = PruningPolicy(scorer, selector=selector, selector_args=settings, keep=keep)
    return found, left_out


class Floor:
    """The plain decoder, whose layers are given as few rows as those of a pruned run."""

    def __init__(self, family: Family, timer: PartTimer, rows: Sequence[int], batch: int) -> None:
        self.family, self.timer, self.rows = family, timer, rows
        width, model = family.decoder_config.hidden_size, family.model
        self.embeds = torch.randn(batch, rows[0], width, device=model.device, dtype=model.dtype)

    def __call__(self) -> float:
        """Return the seconds of a prefill."""
        with ExitStack() as undo:
            for layer, count in zip(self.family.decoder.get_submodule("layers").children(), self.rows, strict=True):
                if count < self.rows[0]:
                    undo.enter_context(hooked(layer, before=_first(count)))
            start = self.timer.clock.mark()
            self.family.decoder(inputs_embeds=self.embeds, use_cache=True)
            return self.timer.clock.seconds(start, self.timer.clock.mark())


def _first(count: int) -> Callable[..., Any]:
    """Return a hook before a layer that cuts its rows to the first `count`."""

    def cut(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("attention_mask") is not None:
            raise RuntimeError("The floor run was given a mask, and rows of a mask are not cut here.")
        angles = tuple(part[:, :count] for part in kwargs["position_embeddings"])
        positions = kwargs.get("position_ids")
        cut_ = {"position_embeddings": angles, "position_ids": None if positions is None else positions[:, :count]}
        return (args[0][:, :count], *args[1:]), {**kwargs, **cut_}

    return cut


class Runs:
    """Runs of one model on one batch: unpruned, under policies, and each one's floor."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.family, self.inputs = find_family(model), inputs
        self.timer = PartTimer(self.family)
        self.batch, columns = inputs["input_ids"].shape
        self.tokens = int((inputs["input_ids"][0] == self.family.placeholder_ids[0]).sum())
        self.text = columns - self.tokens

    def parts(self, policy: PruningPolicy | None, seen: list[Prefill] | None = None) -> Parts:
        """Return the times of one forward of the model, pruned by a policy or not at all."""
        call = lambda: self.family.model(**self.inputs, use_cache=True, logits_to_keep=1)  # noqa: E731
        with ExitStack() as undo:
            undo.enter_context(self.timer.outside())
            note = None if seen is None else seen.append
            pruner = policy and undo.enter_context(applied(self.family.model, policy, on_prefill=note))
            undo.enter_context(self.timer.inside(pruner))
            found = self.timer.time(call)
        assert found is not None
        return found

    def layers(self, policy: PruningPolicy) -> Tensor:
        """Return the visual tokens that each layer reads under a policy, int64 [B, depth], and warm up."""
        seen: list[Prefill] = []
        self.parts(policy, seen)
        return seen[-1].per_layer

    def bound(self, read: Tensor) -> float:
        """Return the FLOPs of the decoder's layers as a share of the unpruned model's."""
        sizes = [torch.full((self.batch,), size, device=read.device) for size in (self.text, self.tokens)]
        return Prices.of(self.family).share("prefill_flops", Prompts.of(*sizes), read)


def against_floor(runs: Runs, methods: dict[str, PruningPolicy], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each method: its prefill, choosing included, against its floor run and the unpruned prefill.

    All runs take turns, in an order that differs from round to round, for so many seconds and rounds at most.
    """
    read = {name: runs.layers(policy) for name, policy in methods.items()}
    rows = {name: tuple((each.amax(0) + runs.text).tolist()) for name, each in read.items()}
    floors = {each: Floor(runs.family, runs.timer, each, runs.batch) for each in set(rows.values())}
    for run in (lambda: runs.parts(None), *floors.values()):
        run()  # to warm up
    found: dict[Any, list[Any]] = {}
    order, end, done = random.Random(0), time.monotonic() + seconds, 0
    while done < LEAST or (done < rounds and time.monotonic() < end):
        cases: list[tuple[Any, Callable[[], Any]]] = [(PLAIN, lambda: runs.parts(None)), *floors.items()]
        cases += [(name, lambda policy=policy: runs.parts(policy)) for name, policy in methods.items()]
        for key, run in order.sample(cases, len(cases)):
            found.setdefault(key, []).append(run())
        done += 1
    plain = [parts.reading for parts in found[PLAIN]]
    return [
        {
            "method": name,
            "tokens": runs.tokens,
            "batch": runs.batch,
            "keep": policy.keep,
            "rounds": done,
            "plain_s": statistics.median(plain),
            "floor_s": statistics.median(found[rows[name]]),
            "pruned_s": statistics.median(parts.reading for parts in found[name]),
            "over_floor": ratio([parts.reading for parts in found[name]], found[rows[name]]),
            "over_plain": ratio([parts.reading for parts in found[name]], plain),
            "choosing_share": ratio([parts.choosing for parts in found[name]], plain),
            "flops_share": runs.bound(read[name]),
        }
        for name, policy in methods.items()
    ]


def ratio(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of paired ratios, and the 95% bootstrap interval of that median."""
    return median_interval([value / other for value, other in zip(values, base, strict=True)])
