"""Compare the calibrated policies with fixed rules, on the same test questions at the same budgets.

python examples/easy_vqa/compare.py              # writes runs/easy_vqa/table.md
"""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule
from model import LAYERS
from project import KEEPS, TESTS, options, read_data, read_model, trainer
from scenes import write_noisy
from torch.utils.data import DataLoader

from catp_lightning import PruningPolicy, TokenPruning
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.metrics.benchmarks import EasyVQAAccuracy

CONTROLS = {
    "random": [PruningPolicy("random", {"seed": seed}) for seed in range(3)],
    "grid": [PruningPolicy("grid")],
    "L2 norm": [PruningPolicy("l2-norm")],
    "DivPrune": [PruningPolicy("divprune")],
}
RULES = {
    **CONTROLS,
    "FasterVLM": [PruningPolicy("fastervlm")],
    "VisionZip": [PruningPolicy("visionzip")],
    **{f"FastV, layer {layer}": [PruningPolicy("fastv", {"layer": layer})] for layer in range(1, LAYERS)},
}
NOISY = "noisy"  # the scenes again, with noise that neither training nor calibration had
TITLES = {"single": "One image", "scenes": "Nine images in a scene", NOISY: "The same scenes with noise"}


def answers(module: LightningModule, batches: list[Any], policy: PruningPolicy | None) -> tuple[list[str], float]:
    """Return the answers of `trainer.predict`, and the mean number of visual tokens kept (0: unpruned)."""
    pruning = [] if policy is None else [TokenPruning(policy)]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    predicted = trainer(*pruning).predict(module, loader) or []
    said = [answer["answer"] for batch in predicted for answer in batch]
    return said, pruning[0].figures["catp/tokens_kept"] if pruning else 0.0


def compare(out: Path, test: str) -> Comparison:
    """Answer the questions of a test split unpruned and by every rule at every budget."""
    module, batches = read_model(out), list(read_data(out, test).test_dataloader())
    right = [answer for batch in batches for answer in batch["references"]]
    images = [int(image) for batch in batches for image in batch["image_ids"]]
    points = EasyVQAAccuracy().points
    unpruned, _ = answers(module, batches, None)

    def result(name: str, keep: float | None, said: list[str], tokens: float) -> Result:
        score = np.array([points(*pair) for pair in zip(said, right, strict=True)], float)
        same = np.array([one == other for one, other in zip(said, unpruned, strict=True)], float)
        return Result(name, keep, score, same, tokens)

    found = Comparison(images, "calibrated", [result("unpruned", None, unpruned, 0.0)])
    for keep in KEEPS:
        calibrated = [PruningPolicy.load(out / "policies", keep=keep)]
        for name, policies in {"calibrated": calibrated, **RULES}.items():
            for policy in policies:
                found.results.append(result(name, keep, *answers(module, batches, policy.with_keep(keep))))
    return found


def table(title: str, found: Comparison) -> str:
    """Return agreement and accuracy of every rule and budget as a Markdown table, and calibrated's best control."""
    rows = found.rows()
    at = {(row["method"], row["keep"]): row for row in rows}
    lines = [
        f"## {title}\n",
        f"{len(found.images)} questions about {len(set(found.images))} images; accuracy of the unpruned model: "
        f"{rows[0]['accuracy']:.3f} ({_interval(rows[0]['accuracy_interval'])}).\n",
        "| | " + " | ".join(f"keep {keep:g}" for keep in KEEPS) + " |",
        "|---" * (len(KEEPS) + 1) + "|",
    ]
    for name in ("calibrated", *RULES):
        cells = [
            f"{row['agreement']:.3f} ({_interval(row['agreement_interval'])}), {row['accuracy']:.3f}"
            for row in (at[name, keep] for keep in KEEPS)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    best = [max((at[name, keep] for name in CONTROLS), key=lambda row: float(row["agreement"])) for keep in KEEPS]
    cells = [
        f"{row['reference_ahead']:+.3f} ({_interval(row['reference_ahead_interval'], '+')}), {row['method']}"
        for row in best
    ]
    lines.append(f"| calibrated ahead of the best control | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(ends: list[float], sign: str = "") -> str:
    return " to ".join(f"{end:{sign}.3f}" for end in ends)


def main() -> None:
    out = options(__doc__).out
    write_noisy(out / "data" / NOISY, out / "data" / "scenes")
    tables = [table(TITLES[test], compare(out, test)) for test in (*TESTS, NOISY)]
    (out / "table.md").write_text("\n".join(tables))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
