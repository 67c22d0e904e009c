"""Measure calibrated policies of every shipped model against all fixed rules, also on scenes unlike the calibration's.

    python -m benchmarks.shift --output runs/shift
    python -m benchmarks.shift --draws 1 --keep 0.25 0.125 --test 240 --promise 0.05 --output runs/shifts

Each model is calibrated on several disjoint draws of questions. The policies and every rule without a chosen setting
(controls, published rules, diversity alone) then answer questions about digits that neither training nor calibration
saw, and as many on each of the test sets of `SHIFTS`: noisier and fainter digits, moved or smaller ones, more of them,
questions in another mix, or after another question. With `--promise` a calibration chooses the budget as well, so that
at most this share of the answers change, and the share that does change is measured on every test set. Vision runs once
a batch for all rules; answers are replayed, teacher-forced, which is a pruned greedy run as far as agreement goes.

`shift.md` has verdicts and a page of tables for each model, `sets.md` a table for each model and budget with all test
sets. Policies that an earlier run left in the output folder are used again: remove `draw-*` and `promise-*` to
calibrate anew.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from benchmarks.answers import QUIET
from benchmarks.shift_replay import PROMISED, replayed, rules, rules_inside
from benchmarks.shift_sets import sets_page
from benchmarks.shift_tables import BUDGETS, Measured, page
from catp_lightning import CrossAttentionCalibration, PruningPolicy, VQAModule
from catp_lightning.calibration.search.promise import GRID
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.scenes import Split
from catp_lightning.data.shifts import SHIFTS, Shift
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.data.vqa_dataset import VQASplit
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.utils.files import write_json, write_text
from catp_lightning.utils.messages import quiet

BATCH, PROMISE_QUESTIONS, PROMISE_SEED = 64, 600, 900
PROMISE_BUDGETS: dict[str, Sequence[float]] = dict.fromkeys(SHIPPED, (0.75, 0.5, 0.25, 0.125))
PROMISE_BUDGETS["digits_llava"] = GRID  # the default: its walk goes on below 1/8
PLAIN = "as calibrated"
SETTINGS = {PLAIN: Shift(), **SHIFTS}


def scenes(folder: Path, model: str, split: Split, questions: int, seed: int, setting: Shift) -> VQASplit:
    """Write scenes on the grids that a model knows, and return them as a split."""
    return VQASplit.of_scenes(setting.write(folder, split, questions, seed, GRIDS[model]))


def calibrate(
    module: VQAModule, model: str, folder: Path, draw: int, questions: int, budgets: Sequence[float]
) -> list[PruningPolicy]:
    """Return a policy for each budget, calibrated on a draw of questions; those of an earlier run are used again."""
    place = folder / model / f"draw-{draw}" / f"{questions}-questions"
    if not all((place / budget_file_name(keep)).exists() for keep in budgets):
        split = scenes(place / "data", model, "calibration", questions, draw, Shift())
        _predict(module, model, split, CrossAttentionCalibration(place, keep=budgets))
    return [PruningPolicy.load(place, keep) for keep in budgets]


def promised(module: VQAModule, model: str, folder: Path, most: float) -> PruningPolicy:
    """Return the policy whose budget changes at most a share of the answers; that of an earlier run is used again.

    Every image is asked one question, and half of them test the promise.
    """
    place = folder / model / f"promise-{most:g}"
    if not (place / "policy.json").exists():
        setting = Shift(questions_per_image=1)
        split = scenes(place / "data", model, "calibration", PROMISE_QUESTIONS, PROMISE_SEED, setting)
        keep = PROMISE_BUDGETS[model]
        _predict(module, model, split, CrossAttentionCalibration(place / "policy.json", keep, max_disagreement=most))
    return PruningPolicy.load(place / "policy.json")


def _predict(module: VQAModule, model: str, split: VQASplit, callback: CrossAttentionCalibration) -> None:
    data = VQADataModule(str(shipped(model)), calibration=split, prompt=PROMPTS[model], batch_size=BATCH)
    trainer = Trainer(**QUIET, callbacks=[callback])
    trainer.predict(module, data.calibration_dataloader(), return_predictions=False)


def measure(model: str, options: argparse.Namespace, console: Console) -> Measured:
    """Calibrate a model on every draw, and replay policies and rules on every test set."""
    module, calibrated, folder = VQAModule(str(shipped(model))), [], options.output
    budgets = tuple(options.keep or BUDGETS[model])
    for draw in range(options.draws):
        start = time.perf_counter()
        calibrated.append(calibrate(module, model, folder, draw, options.questions, budgets))
        names = "; ".join(str(policy.evidence["chosen"]) for policy in calibrated[-1])
        took = f"{time.perf_counter() - start:.0f} s"
        console.print(f"{model}, draw {draw + 1} of {options.draws}, {took}: {names}", highlight=False, markup=False)
    jobs = [(name, policy.with_keep(keep)) for name, policy in rules(module) for keep in budgets]
    jobs += [(name, policy.with_keep(min(budgets))) for name, policy in rules_inside(module)]
    jobs += [(CALIBRATED, policy) for of_draw in calibrated for policy in of_draw]
    promise = None
    if options.promise is not None:
        policy = promised(module, model, folder, options.promise)
        promise = policy.keep, policy.evidence["promise"]
        jobs.append((PROMISED, policy))
        console.print(f"{model}, at most {options.promise:.0%} of answers change: keep {policy.keep}", highlight=False)
    found = {}
    for name, setting in SETTINGS.items():
        place = folder / model / "test" / name.replace(" ", "-")
        split = scenes(place, model, "test", options.test, 0, setting)
        data = VQADataModule(str(shipped(model)), test=split, prompt=PROMPTS[model], batch_size=BATCH)
        batches = track(data.test_dataloader(), f"{model}, {name}: replaying {len(jobs)} policies", console=console)
        found[name] = replayed(module, batches, jobs)
    chosen = [[str(policy.evidence["chosen"]) for policy in of_draw] for of_draw in calibrated]
    return Measured(model, chosen, found, promise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--models", nargs="+", choices=SHIPPED, default=SHIPPED, help="shipped models")
    parser.add_argument("--draws", type=int, default=3, help="disjoint calibration draws")
    parser.add_argument("--questions", type=int, default=512, help="calibration questions of a draw")
    parser.add_argument("--keep", type=float, nargs="+", help="budgets; by default four for each model")
    parser.add_argument("--test", type=int, default=1000, help="questions of each test set")
    parser.add_argument("--promise", type=float, help="share of the answers that may change, to choose a budget by")
    options = parser.parse_args()
    console, start, found = Console(), time.perf_counter(), []
    with quiet(ours=False):
        for model in options.models:
            found.append(measure(model, options, console))
            draws = f"{options.draws} draw{'s' * (options.draws > 1)}"
            about = f"{draws} of {options.questions:,} calibration questions; {options.test:,} test"
            text = page(found, f"{about} questions in every setting.")
            # after every model: a long run may be interrupted
            write_text(options.output / "shift.md", text)
            write_text(options.output / "sets.md", sets_page(found, f"{about} questions in every set."))
            write_json(options.output / "shift.json", {each.model: each.to_dict() for each in found}, indent=2)
    console.print(Markdown(text))
    console.print(f"Done in {time.perf_counter() - start:.0f} s. Results are in {options.output}.")


if __name__ == "__main__":
    main()
