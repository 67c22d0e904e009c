"""Measure calibrated policies of every shipped model against all fixed rules, also on scenes unlike the calibration's.

    python -m benchmarks.shift --output runs/shift

Each model is calibrated on several disjoint draws of questions. The policies and every rule without a chosen setting
(controls, published rules, diversity alone) then answer 1,000 questions about digits that neither training nor
calibration saw, and as many about the same digits drawn otherwise: noisier and fainter, moved, more of them, or asked
about in another mix. Vision runs once a batch for all rules; answers are replayed, teacher-forced, which is a pruned
greedy run as far as agreement goes.

Policies that an earlier run left in the output folder are used again: remove `draw-*` to calibrate anew.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from benchmarks.answers import QUIET
from benchmarks.shift_tables import BUDGETS, Measured, Replayed, page
from catp_lightning import CrossAttentionCalibration, PruningPolicy, VQAModule
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import Variants
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.candidates import default_candidates
from catp_lightning.calibration.search.ranks import limits, token_ranks
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.scenes import AS_TRAINED, KINDS, Drawing, Split, write_scenes
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.data.vqa_dataset import VQASplit
from catp_lightning.evaluation.sweep.methods import CALIBRATED, RANDOM_SEEDS
from catp_lightning.methods.observation import join
from catp_lightning.methods.selection import protected_tokens
from catp_lightning.models import find_family
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.utils.files import write_json, write_text
from catp_lightning.utils.messages import quiet

TEST_QUESTIONS, BATCH = 1000, 64


@dataclass(frozen=True)
class Setting:
    """How scenes are drawn and what is asked about them."""

    drawing: Drawing = AS_TRAINED
    kinds: Sequence[str] = KINDS
    questions_per_image: int = 2


SETTINGS = {
    "as calibrated": Setting(),
    "noisy": Setting(Drawing(noise=2 * AS_TRAINED.noise, contrast=(0.35, 0.5))),
    "moved": Setting(Drawing(shift=3)),
    "crowded": Setting(Drawing(digits=(4, 5))),
    # One question an image: seven in ten are the same words, and no image should be asked them twice.
    "other questions": Setting(kinds=("how many",) * 7 + KINDS[1:], questions_per_image=1),
}


def scenes(folder: Path, model: str, split: Split, questions: int, seed: int, setting: Setting) -> VQASplit:
    """Write scenes on the grids that a model knows, and return them as a split."""
    more: dict[str, Any] = {"drawing": setting.drawing, "kinds": setting.kinds, "grids": GRIDS[model]}
    return VQASplit.of_scenes(write_scenes(folder, split, questions, seed, setting.questions_per_image, **more))


def calibrate(module: VQAModule, model: str, folder: Path, draw: int, questions: int) -> list[PruningPolicy]:
    """Return a policy for each budget, calibrated on a draw of questions; those of an earlier run are used again."""
    place = folder / model / f"draw-{draw}" / f"{questions}-questions"
    if not all((place / budget_file_name(keep)).exists() for keep in BUDGETS[model]):
        split = scenes(place / "data", model, "calibration", questions, draw, Setting())
        data = VQADataModule(str(shipped(model)), calibration=split, prompt=PROMPTS[model], batch_size=BATCH)
        callback = CrossAttentionCalibration(place, keep=BUDGETS[model])
        trainer = Trainer(**QUIET, callbacks=[callback])
        trainer.predict(module, data.calibration_dataloader(), return_predictions=False)
    return [PruningPolicy.load(place, keep) for keep in BUDGETS[model]]


def rules(module: VQAModule) -> Iterator[tuple[str, Candidate]]:
    """Yield every rule without a chosen setting that drops tokens before the decoder; random, once for each seed."""
    for seed in RANDOM_SEEDS:
        yield f"random ({len(RANDOM_SEEDS)} seeds)", Candidate("random", "random", {"seed": seed})
    for rule in default_candidates(Plan.of(find_family(module))):
        if rule.fitted == 0 and rule.name != "random":
            yield rule.name, rule


@torch.inference_mode()
def replayed(module: VQAModule, batches: Iterable[Any], jobs: Sequence[tuple[str, PruningPolicy]]) -> Replayed:
    """Replay the answers of every policy; vision runs once a batch, and rules that policies share rank tokens once."""
    keeps = [policy.keep for _, policy in jobs]
    methods = [policy.method() for _, policy in jobs]
    ranked = list(dict.fromkeys(method for method in methods if method.nested))
    order = []
    for keep in dict.fromkeys(keeps):
        own = [number for number, of_job in enumerate(keeps) if of_job == keep]
        nested = [number for number in own if methods[number].nested]
        order.append((keep, nested, [number for number in own if number not in nested]))
    recorder = Recorder(Plan.of(find_family(module)), join(method.needs for method in methods))
    agreed, kept, images, kinds = [], [], [], []
    with recorder.recording():
        for batch in batches:
            module.answer(batch)
            images += batch["image_ids"].tolist()
            kinds += batch["question_types"]
            with recorder.recorded() as pairs:
                ((replay, seen, *_),) = pairs
                visual = replay.tokens
                allowed = [limits(keep, seen, visual) for keep, _, _ in order]
                ranks = token_ranks(ranked, seen, visual, max(int(limit.max()) for limit in allowed))
                stay, ways = protected_tokens(seen, visual), []
                for limit, (keep, nested, others) in zip(allowed, order, strict=True):
                    tokens = (ranks[[ranked.index(methods[number]) for number in nested]] < limit) | stay
                    ways.append(Variants(tokens, [methods[number].select(seen, keep, visual) for number in others]))
                same = torch.empty(len(jobs), len(visual), dtype=torch.bool, device="cpu")
                count = torch.empty(len(jobs), len(visual), dtype=torch.int64, device="cpu")
                for (_, nested, others), way, (_, found) in zip(order, ways, replay.compare_each(ways), strict=True):
                    same[nested + others] = found.cpu()
                    stays = torch.cat([way.keep, *(selection.keep[None] for selection in way.selections)])
                    count[nested + others] = stays.sum(-1).cpu()
                agreed.append(same)
                kept.append(count)
    names = [name for name, _ in jobs]
    tokens_kept = torch.cat(kept, 1).double().mean(1).tolist()
    return Replayed(names, keeps, torch.cat(agreed, 1).numpy(), tokens_kept, images, kinds)


def measure(model: str, folder: Path, draws: int, questions: int, console: Console) -> Measured:
    """Calibrate a model on every draw, and replay policies and rules in every setting."""
    module, calibrated = VQAModule(str(shipped(model))), []
    for draw in range(draws):
        start = time.perf_counter()
        calibrated.append(calibrate(module, model, folder, draw, questions))
        names = "; ".join(str(policy.evidence["chosen"]) for policy in calibrated[-1])
        took = f"{time.perf_counter() - start:.0f} s"
        console.print(f"{model}, draw {draw + 1} of {draws}, {took}: {names}", highlight=False, markup=False)
    jobs = [(name, rule.policy(keep)) for name, rule in rules(module) for keep in BUDGETS[model]]
    jobs += [(CALIBRATED, policy) for of_draw in calibrated for policy in of_draw]
    found = {}
    for name, setting in SETTINGS.items():
        place = folder / model / "test" / name.replace(" ", "-")
        split = scenes(place, model, "test", TEST_QUESTIONS, 0, setting)
        data = VQADataModule(str(shipped(model)), test=split, prompt=PROMPTS[model], batch_size=BATCH)
        batches = track(data.test_dataloader(), f"{model}, {name}: replaying {len(jobs)} policies", console=console)
        found[name] = replayed(module, batches, jobs)
    return Measured(model, [[str(policy.evidence["chosen"]) for policy in of_draw] for of_draw in calibrated], found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--models", nargs="+", choices=SHIPPED, default=SHIPPED, help="shipped models")
    parser.add_argument("--draws", type=int, default=3, help="disjoint calibration draws")
    parser.add_argument("--questions", type=int, default=512, help="calibration questions of a draw")
    arguments = parser.parse_args()
    console, start, found = Console(), time.perf_counter(), []
    with quiet(ours=False):
        for model in arguments.models:
            found.append(measure(model, arguments.output, arguments.draws, arguments.questions, console))
            about = f"{arguments.draws} draws of {arguments.questions:,} calibration questions; {TEST_QUESTIONS:,} test"
            text = page(found, f"{about} questions in every setting.")
            write_text(arguments.output / "shift.md", text)  # after every model: a long run may be interrupted
            write_json(arguments.output / "shift.json", {each.model: each.to_dict() for each in found}, indent=2)
    console.print(Markdown(text))
    console.print(f"Done in {time.perf_counter() - start:.0f} s. Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
