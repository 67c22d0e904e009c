"""The demo on the shipped BLIP-2: calibrate, save policies, predict on fewer tokens, compare with fixed rules."""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch.utils.data import DataLoader

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.search.candidates import Candidate, default_candidates
from catp_lightning.callbacks import CrossAttentionCalibration, TokenPruning
from catp_lightning.data import shipped
from catp_lightning.data.scenes import Split, write_scenes
from catp_lightning.data.vqa import VQABatch, VQADataModule, VQASplit
from catp_lightning.evaluation.comparison import Comparison, Result, console_tables, save_comparison
from catp_lightning.metrics import vqa_score
from catp_lightning.models import find_family
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.safe_text import one_line, rich_text
from catp_lightning.utils.messages import quiet
from catp_lightning.utils.progress import Lines, shows_bars
from catp_lightning.utils.threads import at_most

BUDGETS = (0.5, 0.25, 0.125)
RANDOM_SEEDS = (0, 1, 2)
CALIBRATED = "calibrated"
QUIET: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "logger": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
RULES = {
    "stride": "stride",
    "l2-norm": "L2 norm",
    "self-attention": "self-attention",
    "catp": "CATP, all layers",
    "catp weighted by image token": "CATP, image-token weights",
    "cross-attention": "mean log attention",
    "diversity of outputs": "diversity alone",
}
"""Fixed rules of the table: names of candidates, and the names that the table shows."""


def run_demo(output: str, questions: int, calibration_questions: int, seed: int) -> None:
    """Calibrate the shipped BLIP-2 on digit scenes and compare it, pruned, with every fixed rule.

    Args:
        output: folder for the results: policies, table, plot and an offline Weights & Biases run.
        questions: number of test questions, about digits that neither training nor calibration saw.
        calibration_questions: number of questions the policies are chosen on.
        seed: seed of the scenes.
    """
    console, folder, start = Console(), Path(output), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    model = str(shipped("digits_blip2"))
    # One thread: on matrices this small several are hardly faster, and beside other work they wait for each other.
    with at_most(1), Lines("writing digit scenes", sys.stdout) as lines:
        console.print(f"Writing {calibration_questions} calibration and {questions} test questions about digit scenes.")
        with quiet():
            data = VQADataModule(
                model,
                calibration=scenes_split(folder, "calibration", calibration_questions, seed),
                test=scenes_split(folder, "test", questions, seed),
                batch_size=64,
            )
            module = VQAModule(model)
            lines.now = f"calibrating on {calibration_questions} questions"
            policies = calibrate(module, data, folder)
        with quiet(ours=False):
            comparison = compare(module, data, policies, console, lines)
        lines.now = "writing tables"
        rows = save_comparison(comparison, folder, f"The shipped BLIP-2 on {questions} test questions")
    for table in console_tables(rows, comparison.reference):
        console.print(table)
    for policy in policies:
        console.print(f"keep {policy.keep}: calibration chose", rich_text(policy.evidence["chosen"], "bold"))
    console.print(
        Text.assemble(
            f"\nDone in {time.monotonic() - start:.0f} s. Results are in ",
            rich_text(folder, "bold"),
            ": table.md, table.json, accuracy.png, policies/, and an offline Weights & Biases run in wandb/.",
        )
    )


def calibrate(module: VQAModule, data: VQADataModule, folder: Path) -> list[PruningPolicy]:
    """Return a policy for each of `BUDGETS`, saved in `folder/policies`; log the run to Weights & Biases, offline."""
    import wandb

    logger = WandbLogger(project="catp-lightning", name="demo", save_dir=str(folder), offline=True)
    callback = CrossAttentionCalibration(folder / "policies", keep=BUDGETS)
    bars = shows_bars()
    trainer = Trainer(**{**QUIET, "logger": logger}, callbacks=[callback], enable_progress_bar=bars)
    trainer.predict(module, data.calibration_dataloader(), return_predictions=False)
    wandb.finish()
    return callback.policies


def compare(
    module: VQAModule, data: VQADataModule, policies: list[PruningPolicy], console: Console, lines: Lines
) -> Comparison:
    """Return the comparison of every method at every budget on the test questions."""
    lines.now = "answering without pruning"
    batches: list[VQABatch] = list(data.test_dataloader())  # read once: forty methods see the same tensors
    full, _ = predict(module, batches, None)
    every = float(module.model.config.num_query_tokens)
    images = [image for batch in batches for image in batch["image_ids"].tolist()]
    comparison = Comparison(images, CALIBRATED, [_result("no pruning", None, full, full, every, batches)])
    rules = fixed_rules(module, RULES, layers=False)  # each layer alone is in the report of the calibration
    jobs = [(name, policy) for name, rule in rules for policy in map(rule.policy, BUDGETS)]
    jobs += [(CALIBRATED, policy) for policy in policies]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not shows_bars()) as progress:
        task = progress.add_task("comparing", total=len(jobs))
        for number, (name, policy) in enumerate(jobs, 1):
            progress.update(task, description=one_line(f"{name}, keep {policy.keep}"))
            lines.now = f"{number} of {len(jobs)}: {name}, keep {policy.keep}"
            answers, tokens = predict(module, batches, policy)
            comparison.results.append(_result(name, policy.keep, answers, full, tokens, batches))
            progress.advance(task)
        progress.update(task, description="compared")
    return comparison


def fixed_rules(module: VQAModule, shown: Mapping[str, str], layers: bool = True) -> Iterator[tuple[str, Candidate]]:
    """Yield fixed rules by the names a table shows.

    Rules are random, once for each seed, those of `shown` (candidate's name to the name shown), and with `layers` each
    layer of CATP alone.
    """
    rules = {candidate.name: candidate for candidate in default_candidates(Plan.of(find_family(module)))}
    for seed in RANDOM_SEEDS:
        yield f"random ({len(RANDOM_SEEDS)} seeds)", Candidate("random", "random", {"seed": seed})
    for name, title in shown.items():
        yield title, rules[name]
        if name == "catp" and layers:
            alone = (name for name in rules if name.startswith("catp layer"))
            yield from ((name.replace("catp", "CATP,"), rules[name]) for name in alone)


def predict(module: VQAModule, batches: list[VQABatch], policy: PruningPolicy | None) -> tuple[list[str], float]:
    """Return the answers of `trainer.predict`, pruned by the callback a user adds, and the mean visual tokens kept.

    `policy` None: the model is not pruned, and the mean is NaN.
    """
    pruning = None if policy is None else TokenPruning(policy)
    trainer = Trainer(**QUIET, callbacks=pruning, enable_progress_bar=False)
    # Right answers are thousands of texts, which moving a batch to the device would go through.
    asked: Any = [{"question_ids": batch["question_ids"], "inputs": batch["inputs"]} for batch in batches]
    loader: DataLoader[Any] = DataLoader(asked, batch_size=None, collate_fn=_as_it_is)
    predictions = trainer.predict(module, loader) or []
    answers = [answer["answer"] for batch in predictions for answer in batch]
    return answers, pruning.figures["catp/tokens_kept"] if pruning else float("nan")


def _as_it_is(batch: Any) -> Any:
    return batch


def _result(
    name: str, keep: int | float | None, answers: list[str], full: list[str], tokens: float, batches: list[VQABatch]
) -> Result:
    truth = [ten for batch in batches for ten in batch["answers"]]
    score = [vqa_score(answer, ten) / 30 for answer, ten in zip(answers, truth, strict=True)]
    same = [float(answer == other) for answer, other in zip(answers, full, strict=True)]
    return Result(name, keep, np.array(score), np.array(same), tokens)


def scenes_split(folder: Path, split: Split, questions: int, seed: int) -> VQASplit:
    """Write digit scenes into `folder/data/<split>` and return them as a split."""
    place = write_scenes(folder / "data" / split, split, questions, seed)
    return VQASplit.of_scenes(place)
