"""Measure how often a pruned BLIP-2 gives the unpruned answer: calibrated policy and every rival, with intervals.

    python -m benchmarks.agreement --output runs/agreement
    python -m benchmarks.agreement --output runs/stability --stability

The first calibrates the shipped model on five disjoint draws of 512 questions and tests on 4,000 about digits that
neither training nor calibration saw. The second repeats the calibration on ten disjoint draws of 64, 256 and 512
questions and shows how far the agreement on 2,000 test questions spreads; what is calibrated is saved, and a run that
was interrupted goes on.

Vision runs once a batch for all policies; the answers are replayed with fewer tokens, teacher-forced, which is a pruned
greedy run as far as agreement goes. One policy is predicted for real as well, and has to agree question by question.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from benchmarks.agreement_spread import SIZES, spread, spread_figure
from benchmarks.agreement_verdicts import BEST, BUDGETS, CONTROLS, SHOWN, met, verdicts
from benchmarks.answers import QUIET, predict, scenes_split
from catp_lightning import CrossAttentionCalibration, PruningPolicy, VQAModule
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.candidates import default_candidates
from catp_lightning.calibration.search.ranks import token_ranks
from catp_lightning.data import shipped
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.figure import figure
from catp_lightning.evaluation.sweep.methods import CALIBRATED, RANDOM_SEEDS
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.observation import join
from catp_lightning.models import find_family
from catp_lightning.policy.images import decode_images
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.utils.files import write_bytes, write_json, write_text
from catp_lightning.utils.messages import quiet
from catp_lightning.utils.plots import png

BATCH = 64
CALIBRATION_QUESTIONS, TEST_QUESTIONS = 512, 4000
TABLE_DRAWS = 5
DRAWS, STABILITY_QUESTIONS = 10, 2000


@dataclass(frozen=True)
class Replayed:
    """Agreement of P policies on N questions.

    Attributes:
        same: bool [P, N], True where a policy's answer is the unpruned one.
        answers: the N unpruned answers.
        images: ids of the images that the questions are about.
    """

    same: np.ndarray
    answers: list[str]
    images: list[int]


@torch.inference_mode()
def replayed(module: VQAModule, batches: Iterable[Any], policies: Sequence[PruningPolicy]) -> Replayed:
    """Replay every policy's answers; vision runs once a batch, and rules that policies share are scored once."""
    rules, rule_of = _rules(policies)
    methods = [method for rule in rules for method in (rule.build_scorer(), rule.build_selector())]
    recorder = Recorder(Plan.of(find_family(module)), join(method.needs for method in methods))
    found, answers, images = [], [], []
    with recorder.recording():
        for batch in batches:
            answers += module.answer(batch)
            images += batch["image_ids"].tolist()
            with recorder.recorded() as pairs:
                ((replay, seen, *_),) = pairs
                counts = torch.tensor([keep_count(policy.keep, seen.tokens) for policy in policies])
                ranks = token_ranks([rule.method() for rule in rules], seen, replay.tokens, int(counts.max()))
                same = torch.empty(len(policies), ranks.shape[1], dtype=torch.bool)
                for count in counts.unique():  # in one call all would be padded to the longest
                    same[counts == count] = replay.compare(ranks[rule_of[counts == count]] < count)[1]
                found.append(same.numpy())
    return Replayed(np.concatenate(found, 1), answers, images)


def _rules(policies: Sequence[PruningPolicy]) -> tuple[list[PruningPolicy], torch.Tensor]:
    """Return the rules of P policies without budgets, each once, and the index of each policy's rule: int64 [P]."""
    rules: list[PruningPolicy] = []
    places = []
    for policy in policies:
        rule = PruningPolicy(policy.scorer, policy.scorer_args, policy.selector, policy.selector_args)
        if rule not in rules:
            rules.append(rule)
        places.append(rules.index(rule))
    return rules, torch.tensor(places)


def calibrate(module: VQAModule, data: VQADataModule, folder: Path, questions: int) -> list[PruningPolicy]:
    """Return a policy for each budget, calibrated on the first `questions`, a multiple of the batch size."""
    callback = CrossAttentionCalibration(folder, keep=BUDGETS)
    trainer = Trainer(**QUIET, callbacks=[callback], limit_predict_batches=questions // BATCH)
    trainer.predict(module, data.calibration_dataloader(), return_predictions=False)
    return callback.policies


def fixed_rules(module: VQAModule) -> Iterator[tuple[str, Candidate]]:
    """Yield fixed rules by the names the table shows: random, once for each seed, `SHOWN`, and CATP's single layers."""
    rules = {candidate.name: candidate for candidate in default_candidates(Plan.of(find_family(module)))}
    for seed in RANDOM_SEEDS:
        yield f"random ({len(RANDOM_SEEDS)} seeds)", Candidate("random", "random", {"seed": seed})
    for name, title in SHOWN.items():
        yield title, rules[name]
        if name == "catp":
            alone = (name for name in rules if name.startswith("catp layer"))
            yield from ((name.replace("catp", "CATP,"), rules[name]) for name in alone)


def table(folder: Path, console: Console) -> str:
    """Calibrate, test, and write `table.md`, `table.json` and `agreement.png`; returns the verdicts as Markdown."""
    model = str(shipped("digits_blip2"))
    test_split = scenes_split(folder, "test", TEST_QUESTIONS, 0)
    module, policies = VQAModule(model), []
    for draw in range(TABLE_DRAWS):
        console.print(f"Calibrating on {CALIBRATION_QUESTIONS} questions, draw {draw + 1} of {TABLE_DRAWS}.")
        policies += _of_draw(module, folder, draw, CALIBRATION_QUESTIONS)
    calibration = scenes_split(folder / "draw-0", "calibration", CALIBRATION_QUESTIONS, 0)
    data = VQADataModule(model, calibration=calibration, test=test_split, batch_size=BATCH)
    rules = list(fixed_rules(module))
    jobs = [(name, rule.policy(keep)) for name, rule in rules for keep in BUDGETS]
    jobs += [(CALIBRATED, policy) for policy in policies]
    batches = list(data.test_dataloader())
    steps = track(batches, f"replaying {len(jobs)} policies", console=console)
    test = replayed(module, steps, [policy for _, policy in jobs])
    checked = jobs[-2]  # the calibrated policy at one of the small budgets, where many answers change
    _check_against_predict(module, batches, checked[1], test.same[-2], test.answers)

    tokens = find_family(module).tokens_per_image
    results = [
        Result(name, policy.keep, None, same.astype(float), keep_count(policy.keep, tokens))
        for (name, policy), same in zip(jobs, test.same, strict=True)
    ]
    layers = [(name, rule.policy(keep)) for name, rule in rules if name.startswith("CATP, layer") for keep in BUDGETS]
    fitted = replayed(module, data.calibration_dataloader(), [policy for _, policy in layers])
    best = best_layers([(name, policy.keep) for name, policy in layers], fitted.same.mean(1))
    of_best = [
        Result(BEST, result.keep, None, result.same, result.tokens)
        for keep, name in best.items()
        for result in results
        if (result.method, result.keep) == (name, keep)
    ]
    ours = len(policies)
    full = Result("no pruning", None, None, np.ones(len(test.images)), tokens or 0)
    comparison = Comparison(test.images, CALIBRATED, [full, *results[:-ours], *of_best, *results[-ours:]])
    return _save_table(comparison, best, policies, folder)


def _check_against_predict(
    module: VQAModule, batches: list[Any], policy: PruningPolicy, same: np.ndarray, answers: list[str]
) -> None:
    """Raise RuntimeError unless `trainer.predict` with TokenPruning agrees exactly where replay says it does."""
    predicted = predict(module, batches, policy)
    wrong = int((np.equal(predicted, answers) != same).sum())
    if wrong:
        raise RuntimeError(
            f"At keep {policy.keep} replay and trainer.predict differ on {wrong} of {len(same)} questions in whether "
            "the pruned answer is the unpruned one: the table would be wrong. Look for what replay does differently."
        )


def best_layers(layers: Sequence[tuple[str, float]], agreement: Sequence[float]) -> dict[float, str]:
    """Return the name that agrees most at each budget, the first of equal ones.

    >>> best_layers([("a", 0.5), ("b", 0.5), ("a", 0.25), ("b", 0.25)], [0.8, 0.9, 0.7, 0.7])
    {0.5: 'b', 0.25: 'a'}
    """
    best: dict[float, tuple[str, float]] = {}
    for (name, keep), value in zip(layers, agreement, strict=True):
        if keep not in best or value > best[keep][1]:
            best[keep] = (name, value)
    return {keep: name for keep, (name, _) in best.items()}


def _save_table(comparison: Comparison, best: dict[float, str], policies: list[PruningPolicy], folder: Path) -> str:
    about = f"{TEST_QUESTIONS:,} questions about {len(set(comparison.images)):,} images."
    shown = ModelTable.of("The shipped BLIP-2", about, comparison, dict.fromkeys(CONTROLS, False), {})
    rows = shown.rows[1:]
    title = f"The shipped BLIP-2 on {TEST_QUESTIONS:,} test questions"
    chosen = {
        keep: "; ".join(policy.evidence["chosen"] for policy in policies if policy.keep == keep) for keep in BUDGETS
    }
    notes = "".join(f"- keep {keep}: calibration chose {chosen[keep]}; {BEST}: {best[keep]}.\n" for keep in BUDGETS)
    found = verdicts(rows)
    write_text(folder / "table.md", f"{shown.markdown()}\n{notes}\n{found}")
    named = {str(keep): {"chosen": chosen[keep], "best layer": best[keep]} for keep in BUDGETS}
    judged = [row if row["method"] == CALIBRATED else {**row, "met": met(row)} for row in rows]
    whole = {"title": title, "reference": comparison.reference, "budgets": named, "rows": judged}
    write_json(folder / "table.json", whole, indent=2)
    write_bytes(folder / "agreement.png", png(figure([shown]), dpi=120))
    return f"{notes}\n{found}"


def stability(folder: Path, console: Console) -> str:
    """Calibrate on every draw, test, and write `stability.md`, `.json` and `.png`; returns the tables as Markdown."""
    module, policies = VQAModule(str(shipped("digits_blip2"))), []
    for draw, size in product(range(DRAWS), SIZES):
        start, found = time.perf_counter(), _of_draw(module, folder, draw, size)
        policies += found
        chosen = "; ".join(str(policy.evidence["chosen"]) for policy in found)
        console.print(f"draw {draw}, {size} questions, {time.perf_counter() - start:.0f} s: {chosen}", highlight=False)
    _check_disjoint(policies)
    split = scenes_split(folder, "test", STABILITY_QUESTIONS, 0)
    data = VQADataModule(str(shipped("digits_blip2")), test=split, batch_size=BATCH)
    batches = data.test_dataloader()
    test = replayed(module, track(batches, f"replaying {len(policies)} policies", console=console), policies)
    agreement = test.same.mean(1).reshape(DRAWS, len(SIZES), len(BUDGETS))
    chosen_by = [policy.evidence["chosen"] for policy in policies]
    axes = {"draws": DRAWS, "sizes": SIZES, "budgets": BUDGETS, "test questions": STABILITY_QUESTIONS}
    by_draw = {"agreement": agreement.tolist(), "chosen": np.reshape(chosen_by, agreement.shape).tolist()}
    write_json(folder / "stability.json", {**axes, **by_draw}, indent=2)
    text = spread(agreement)
    title = f"{DRAWS} disjoint calibration draws, agreement on {STABILITY_QUESTIONS:,} test questions"
    write_text(folder / "stability.md", f"# {title}\n\n{text}")
    spread_figure(agreement).savefig(folder / "stability.png", dpi=120)
    return text


def _of_draw(module: VQAModule, folder: Path, draw: int, size: int) -> list[PruningPolicy]:
    """Return the policies calibrated on the first `size` questions of a draw; those of an earlier run are reused."""
    place = folder / f"draw-{draw}"
    policies = place / f"{size}-questions"
    if all((policies / budget_file_name(keep)).exists() for keep in BUDGETS):
        return [PruningPolicy.load(policies, keep) for keep in BUDGETS]
    split = scenes_split(place, "calibration", max(SIZES), draw)
    data = VQADataModule(str(shipped("digits_blip2")), calibration=split, batch_size=BATCH)
    return calibrate(module, data, policies, size)


def _check_disjoint(policies: Sequence[PruningPolicy]) -> None:
    """Raise RuntimeError if two draws share an image, by the fingerprints that the policies carry."""
    each = len(SIZES) * len(BUDGETS)
    largest = [decode_images(policy.evidence["images"])[0] for policy in policies[each - 1 :: each]]
    together = torch.cat(largest)
    if len(together.unique()) < len(together):
        raise RuntimeError("Two calibration draws share an image: they are no independent draws.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stability", action="store_true", help="ten calibration draws of three sizes instead")
    arguments = parser.parse_args()
    console, start = Console(), time.perf_counter()
    with quiet(ours=False):
        text = (stability if arguments.stability else table)(arguments.output, console)
    console.print(Markdown(text))
    console.print(f"Done in {time.perf_counter() - start:.0f} s. Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
