"""Measure the cost of a calibration on a shipped model, against a plain `trainer.predict` over the same questions.

    python -m benchmarks.calibration
    python -m benchmarks.calibration --model digits_mllama --questions 256
    python -m benchmarks.calibration --rounds 3 --calibrations 1 --shape small --questions-held 256 --processes 1

Times are taken in interleaved rounds and reported as ratios to the plain run of the same round: the median, and the
lowest to the highest. Each peak of memory is that of a process of its own, without the recorded batches that stay in
main memory where they fit: how much they take follows from the data. `OMP_NUM_THREADS=1` makes runs comparable.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from benchmarks.answers import QUIET, scenes_split
from benchmarks.bench.machine import most_held
from benchmarks.observed_attention import BORDA, MEAN_LOG, SDPA, SHAPES, interleaved, ratios, vision_cases
from catp_lightning import CrossAttentionCalibration
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay import memory as recorded_batches
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.callbacks.calibration_run import CalibrationRun
from catp_lightning.callbacks.context import LoopContext, Stage
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.methods.scorers import SCORERS, AttentionScorer
from catp_lightning.models import find_family
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.utils.files import write_json
from catp_lightning.utils.messages import quiet

PLAIN, WHOLE = "plain predict", "whole calibration"
FIRST, STEPS = "the user's steps, observed, and setting up", "recorded batches, read again"
CHOICES, REPORT = "fits and choices", "policies and report written"
BUDGETS = (0.5, 0.25, 0.125)
HELD = ("plain", "calibration", "above")
MIB = 2**20


class Votes(LoopContext):
    """Callback that records every batch as a calibration does and computes one scorer's votes; nothing is replayed."""

    def __init__(self, scorer: AttentionScorer) -> None:
        super().__init__(("predict",))
        self.scorer = scorer
        self.recorder: Recorder | None = None

    @contextmanager
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> Iterator[None]:
        self.recorder = Recorder(Plan.of(find_family(pl_module)), self.scorer.needs)
        with self.recorder.recording():
            yield

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert self.recorder is not None
        with self.recorder.recorded() as pairs, torch.no_grad():
            for _, seen, *_ in pairs:
                self.scorer.head_scores(seen)


class Timed(CrossAttentionCalibration):
    """Calibration callback that notes how many seconds each of its parts took."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, keep=BUDGETS)
        self.parts: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> Iterator[None]:
        measure, read_again = CalibrationRun.measure, CalibrationRun.read_again

        def timed_measure(run: CalibrationRun, *args: Any) -> None:
            title, start = run.now.title, time.perf_counter()
            measure(run, *args)
            self.parts[title] += time.perf_counter() - start

        def timed_again(run: CalibrationRun, trainer: Trainer, done: int) -> None:
            with self._rest_of(STEPS):
                read_again(run, trainer, done)

        with (
            patch.object(CalibrationRun, "measure", timed_measure),
            patch.object(CalibrationRun, "read_again", timed_again),
            super().loop_context(trainer, pl_module, stage),
        ):
            yield

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self._rest_of(CHOICES):
            super().on_predict_epoch_end(trainer, pl_module)

    def _save(self, *args: Any) -> None:
        with self._rest_of(REPORT):
            super()._save(*args)

    @contextmanager
    def _rest_of(self, name: str) -> Iterator[None]:
        """Count for the part `name` the seconds in this context that no other part counts."""
        start, before = time.perf_counter(), sum(self.parts.values())
        yield
        self.parts[name] += time.perf_counter() - start - (sum(self.parts.values()) - before)


class Setting:
    """A shipped model and a split of questions about digit scenes, in batches."""

    def __init__(self, name: str, split: VQASplit, batch: int) -> None:
        model = str(shipped(name))
        self.module = VQAModule(model)
        self.data = VQADataModule(model, calibration=split, batch_size=batch, prompt=PROMPTS[name])

    def predict(self, callback: Callback | None = None) -> None:
        with quiet(ours=False):
            trainer = Trainer(**QUIET, callbacks=callback)
            trainer.predict(self.module, self.data.calibration_dataloader())

    def calibrate(self) -> Timed:
        with tempfile.TemporaryDirectory() as folder:
            callback = Timed(Path(folder))
            self.predict(callback)
        return callback


def row(name: str, values: Sequence[float], base: Sequence[float], bound: float | None = None) -> dict[str, Any]:
    middle, low, high = ratios(values, base)
    found = {"seconds": statistics.median(values), "ratio": middle, "low": low, "high": high}
    return {"what": name, **found, "bound": bound}


def votes(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Time observing and voting on the shipped BLIP-2, against a plain run; returns rows for `show`."""
    cases: dict[str, Callable[[], object]] = {PLAIN: setting.predict}
    bounds = {"cross-attention": 1.1, "catp": None}
    for name in bounds:
        cases[name] = partial(_observed, setting, name)
    seconds = interleaved(cases, rounds, "observing")
    rows = [row(f"observed, votes of {name}", seconds[name], seconds[PLAIN], bound) for name, bound in bounds.items()]
    return [row(PLAIN, seconds[PLAIN], seconds[PLAIN]), *rows]


def _observed(setting: Setting, name: str) -> None:
    scorer = SCORERS[name]()
    assert isinstance(scorer, AttentionScorer)
    setting.predict(Votes(scorer))


def vision(shape: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time rank votes at real shapes with random weights, against the vision part: the language model is not run."""
    cases = {name: case for name, case in vision_cases(shape, batch).items() if name in (SDPA, MEAN_LOG, BORDA)}
    with torch.inference_mode():
        seconds = interleaved(cases, rounds, shape)
    bounds = {BORDA: 1.1}
    return [row(f"{shape}: {name}", seconds[name], seconds[SDPA], bounds.get(name)) for name in cases]


def whole(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Time a calibration with all its parts, against a plain run; returns rows for `show`."""
    parts: list[dict[str, float]] = []
    cases = {PLAIN: setting.predict, WHOLE: lambda: parts.append(setting.calibrate().parts)}
    seconds = interleaved(cases, rounds, "calibrating")
    plain, parts = seconds[PLAIN], parts[-rounds:]  # the first is the warm-up's
    for found, total in zip(parts, seconds[WHOLE], strict=True):
        found[FIRST] = total - sum(found.values())
    rows = [row(PLAIN, plain, plain), row(WHOLE, seconds[WHOLE], plain, 30.0)]
    return rows + [row(f"  {name}", [found[name] for found in parts], plain) for name in parts[0]]


def peak(name: str, split: VQASplit, batch: int, case: str, threads: int) -> dict[str, int]:
    """Return the peak of bytes that this process held in main memory, and on the GPU if there is one."""
    torch.set_num_threads(threads)
    setting = Setting(name, split, batch)
    if case == WHOLE:
        with patch.object(recorded_batches, "LIMIT", 0):
            setting.calibrate()
    else:
        setting.predict()
    held = {"main memory": most_held()}
    if torch.cuda.is_available():
        held["GPU memory"] = torch.cuda.max_memory_allocated()
    return held


def memory(name: str, splits: Mapping[int, VQASplit], batch: int, processes: int, threads: int) -> list[dict[str, Any]]:
    """Measure peaks of memory, MiB, of plain runs and calibrations, each in its own process; medians of several."""
    rows = []
    for number, split in splits.items():
        found: dict[str, list[dict[str, int]]] = {PLAIN: [], WHOLE: []}
        for _ in range(processes):
            for case, peaks in found.items():
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    peaks.append(pool.submit(peak, name, split, batch, case, threads).result())
        for kind in found[PLAIN][0]:
            plain, most = ([held[kind] / MIB for held in found[case]] for case in (PLAIN, WHOLE))
            above = [more - less for more, less in zip(most, plain, strict=True)]
            middle = dict(zip(HELD, map(statistics.median, (plain, most, above)), strict=True))
            limits = {"low": min(above), "high": max(above), "bound": 64.0}
            rows.append({"what": f"{kind}, {number} questions", **middle, **limits})
    return rows


def show(console: Console, title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], digits: int) -> None:
    table = Table("", *columns, "lowest to highest", "at most", title=title, title_justify="left")
    for found in rows:
        values = [f"{found[column]:.{digits}f}" for column in columns]
        spread = f"{found['low']:.{digits}f} to {found['high']:.{digits}f}"
        table.add_row(found["what"], *values, spread, "" if found["bound"] is None else f"{found['bound']:g}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHIPPED, default="digits_blip2")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="of observing")
    parser.add_argument("--calibrations", type=int, default=5, help="rounds of the whole calibration")
    parser.add_argument(
        "--shape", choices=SHAPES, default="blip2-opt-2.7b", help="of the rank votes with random weights"
    )
    parser.add_argument("--shape-batch", type=int, default=2)
    parser.add_argument("--shape-rounds", type=int, default=7)
    parser.add_argument("--questions-held", type=int, nargs="*", default=[256, 1024, 2048], help="of memory peaks")
    parser.add_argument("--processes", type=int, default=3, help="of each memory peak")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="a JSON file")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        name, grids = chosen.model, GRIDS[chosen.model]
        numbers = {chosen.questions, *chosen.questions_held}
        splits = {
            number: scenes_split(Path(folder, str(number)), "calibration", number, 0, grids) for number in numbers
        }
        held = {number: splits[number] for number in chosen.questions_held}
        found = {"memory": memory(name, held, chosen.batch, chosen.processes, chosen.threads)}
        setting = Setting(name, splits[chosen.questions], chosen.batch)
        found["observing"] = votes(setting, chosen.rounds) if name == "digits_blip2" else []
        found["calibration"] = whole(setting, chosen.calibrations)
    found["real shapes"] = vision(chosen.shape, chosen.shape_batch, chosen.shape_rounds)
    console.print(f"{name}, {chosen.questions} questions, batches of {chosen.batch}, {chosen.threads} threads")
    for title in ("observing", "real shapes", "calibration"):
        show(console, title, found[title], ("seconds", "ratio"), 2)
    show(console, "memory without recorded batches, MiB", found["memory"], HELD, 1)
    if chosen.output:
        write_json(chosen.output, {"settings": {**vars(chosen), "output": None}, **found}, indent=2)


if __name__ == "__main__":
    main()
