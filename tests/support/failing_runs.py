"""Runs that fail at any place they come by, and what must be as it was afterwards."""

import functools
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.loggers import Logger
from torch import Tensor

from catp_lightning import CrossAttentionCalibration, PrunedModule, TokenPruning
from tests.support.footprints import footprint, hooks_of
from tests.support.models import TINY, greedily, random_blip2, random_inputs
from tests.support.modules import Batch
from tests.support.policies import HALF
from tests.support.small_calibrations import QUICKEST


def hooks(*classes: type) -> list[str]:
    """Every public method of some classes, whatever a newer Lightning adds."""
    return sorted({name for cls in classes for name, call in vars(cls).items() if callable(call) and name[0] != "_"})


class Moments:
    """Where a run comes by, and where it fails: the n-th time that it comes by a place."""

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()
        self.failing: tuple[str, int] | None = None
        self.error: BaseException | None = None

    def expect(self, place: str | None, number: int = 0, error: BaseException | None = None) -> None:
        self.passed.clear()
        self.failing, self.error = None if place is None else (place, number), error

    def __call__(self, place: str) -> None:
        self.passed[place] += 1
        if self.error is not None and self.failing == (place, self.passed[place]):
            raise self.error

    def watch(self, owner: str, thing: Any, names: list[str]) -> Any:
        """Come by at every call of these methods of one object."""
        for name in names:
            if callable(call := getattr(thing, name, None)):
                setattr(thing, name, self._noting(f"{owner}.{name}", call))
        return thing

    def _noting(self, place: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)  # Lightning reads signatures, and looks through it for what is overridden
        def noting(*args: Any, **kwargs: Any) -> Any:
            self(place)
            return call(*args, **kwargs)

        return noting


class Batches:
    """A loader."""

    def __init__(self, moments: Moments, batch: Batch) -> None:
        self.moments, self.batch = moments, batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Batch]:
        self.moments("loader.iter")
        yield self.batch
        self.moments("loader.end")


class Notes(Logger):
    name, version = "notes", 0  # type: ignore[assignment]

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.moments = moments
        moments.watch("logger", self, hooks(*Logger.__mro__))

    @property
    def experiment(self) -> None:
        self.moments("logger.experiment")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Watched(LightningModule):
    """A user's module. Every hook it has and much of its model is a place where a run may fail."""

    def __init__(self, moments: Moments, samples: int) -> None:
        super().__init__()
        self.model, _ = random_blip2(shape=TINY)
        self.inputs = random_inputs(TINY.queries, samples, True, torch.float32, 4)
        decoder = self.model.language_model.model.decoder
        for place, part in (
            ("vision", self.model.vision_model),
            ("Q-Former", self.model.qformer),
            ("decoder", decoder),
            ("layer", decoder.layers[1]),
        ):
            part.register_forward_pre_hook(lambda *_, place=place: moments(f"forward of {place}"))
        decoder.register_forward_hook(lambda *_: moments("forward of decoder done"))
        moments.watch("module", self, hooks(LightningModule, ModelHooks, DataHooks, CheckpointHooks))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(**batch).logits.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # so that outputs can be compared

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("level", self.model(**batch).logits.mean())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("level", self.model(**batch).logits.mean())

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model.generate(**batch, **greedily(2))

    def outputs(self) -> Tensor:
        with torch.no_grad():
            return self.model.eval()(**self.inputs).logits


def open_files() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return sorted(found)


class Runs:
    """Runs of one stage with one way to prune, all with the same module and, where it is one, the same callback."""

    def __init__(self, kind: str, stage: str, folder: Path) -> None:
        self.kind, self.stage, self.folder, self.moments = kind, stage, folder, Moments()
        self.policies = folder / "new"
        calibrates = kind == "calibration"
        self.module = Watched(self.moments, 16 if calibrates else 2)
        self.loader = Batches(self.moments, self.module.inputs)
        self.ours: list[Callback] = []
        self.root: LightningModule = self.module
        if kind == "wrapper":
            self.root = PrunedModule(self.module, HALF)
        elif calibrates:
            own = {"scorer": "l2-norm", "settings": QUICKEST, "examples": 0}  # where examples fail nothing is raised
            self.ours = [CrossAttentionCalibration(self.policies, keep=0.5, **own)]
        else:
            self.ours = [TokenPruning(HALF, sanity_check=True, compare=True)]
        self.before, self.expected = footprint(self.module.model), self.module.outputs()
        self.roots = self._of_roots()

    def run(self, second: bool = False) -> Any:
        """With a neighbour on either side; `second`: the one before ours fails once more when it hears of the error."""
        first, last = (self.moments.watch(name, Callback(), hooks(Callback)) for name in ("first", "last"))
        if second:
            first.on_exception = _fail
        trainer = Trainer(
            accelerator="cpu", callbacks=[first, *self.ours, last], logger=Notes(self.moments), max_epochs=1,
            default_root_dir=self.folder / "root", enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=self.stage == "fit", num_sanity_val_steps=1, log_every_n_steps=1,
        )  # fmt: skip
        loaders = [self.loader, self.loader] if self.stage == "fit" else [self.loader]
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            return getattr(trainer, self.stage)(self.root, *loaders)

    def places(self) -> list[tuple[str, int]]:
        """Where an undisturbed run comes by: the first time and the last."""
        self.moments.expect(None)
        self.run()
        passed = sorted(self.moments.passed.items())
        self.as_it_was(None)
        return [(place, number) for place, count in passed for number in sorted({1, count})]

    def fails(self, place: str, number: int, error: BaseException, second: bool) -> None:
        self.moments.expect(place, number, error)
        told = place == "logger.log_metrics" and isinstance(error, Exception) and self.stage == "predict"
        try:
            self.run(second)
            assert told, "a warning told of it, and only there"
        except (RuntimeError, SystemExit):
            assert not told
        assert self.moments.passed[place] >= number
        self.as_it_was((place, number))

    def as_it_was(self, place: tuple[str, int] | None) -> None:
        self.moments.expect(None)
        assert footprint(self.module.model) == self.before, place
        assert self._of_roots() == self.roots, place
        assert torch.equal(self.module.outputs(), self.expected), place
        files = {file.name for file in self.policies.rglob("*")}
        if self.kind == "calibration":
            partial, whole = "policy.partial-0.safetensors", {"policy.json", "report", *REPORT}
            assert files in (set(), {partial}, whole, whole | {partial}), place
            assert files or not self.policies.exists()
            shutil.rmtree(self.policies, ignore_errors=True)  # or the next run would do less

    def _of_roots(self) -> list[int]:
        """Hooks on what holds the model; its other attributes are Lightning's to change."""
        return [count for root in (self.root, self.module) for count in hooks_of(root).values()]


def _fail(*args: Any) -> None:
    raise RuntimeError("and once more")


REPORT = ("report.md", "report.html", "retention.png")
"""Files of a report in this calibration."""

FAULTS: list[tuple[type[BaseException], bool]] = [
    (RuntimeError, False), (KeyboardInterrupt, False), (SystemExit, False), (RuntimeError, True)
]  # fmt: skip


def every_place(runs: Runs, by_every_fault: bool, every: int = 1) -> None:
    """By every fault, the first time and the last that a run comes by; or by one, and at one of these, in turn.

    Args:
        runs: the runs.
        by_every_fault: whether all faults are planted at a place.
        every: how many places there are for each that is tried.
    """
    places = runs.places()
    names = {place for place, _ in places}
    if not by_every_fault:
        places = [(place, last if n % 2 else 1) for n, (place, last) in enumerate(dict(places).items())]
    loop = "validation" if runs.stage in ("fit", "validate") else runs.stage
    for hook in ("setup", f"on_{loop}_start", f"on_{loop}_batch_end", f"on_{loop}_epoch_end", "teardown"):
        assert {f"first.{hook}", f"last.{hook}", f"module.{hook}"} <= names
    assert {"loader.iter", "forward of layer", "forward of decoder done", "logger.experiment"} <= names
    assert "logger.log_metrics" in names or (runs.kind, runs.stage) == ("wrapper", "predict")
    opened = open_files()
    for count, (place, number) in enumerate(places[::every]):
        told = place == "logger.log_metrics"  # in predict by us: errors end there, and nothing else does
        for error, second in FAULTS if by_every_fault or told else [FAULTS[count % len(FAULTS)]]:
            runs.fails(place, number, error("planted"), second)
    assert open_files() == opened
    runs.places()  # it still runs, to its end
