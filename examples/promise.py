"""A promise in the place of a budget: "at most 5% of new images change their answer, with 95% confidence".

    python examples/promise.py

Calibration tries budgets from the largest down and takes the last at which the promise holds. The script then counts,
on scenes that calibration never saw, how many answers changed. Each scene has one question: the promise is about new
images, each with one question.
"""

import argparse
from pathlib import Path

from digits import data, module
from lightning.pytorch import Trainer

from catp_lightning import CrossAttentionCalibration, TokenPruning


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/promise"), help="folder for scenes and policy")
    parser.add_argument("--questions", type=int, default=512, help="to calibrate on, and to count on")
    parser.add_argument("--most", type=float, default=0.05, help="share of answers that may change")
    given = parser.parse_args()
    reader, scenes = module(), data(given.output / "scenes", given.questions, given.questions, a_scene=1)
    scenes.setup()

    path = given.output / "policy.json"
    calibration = CrossAttentionCalibration(path, max_disagreement=given.most, confidence=0.95)
    Trainer(logger=False, callbacks=[calibration]).predict(reader, scenes.calibration_dataloader())
    (policy,) = calibration.policies
    for step in policy.evidence["promise"]["steps"]:
        if step["tested"]:
            print(
                f"keep {step['keep']}: at most {step['bound']:.1%} change, {'holds' if step['holds'] else 'too many'}"
            )

    pruning = TokenPruning(path, compare=True)
    Trainer(logger=False, callbacks=[pruning]).test(reader, scenes)
    changed = 1 - pruning.figures["catp/agreement"]
    print(f"promised: at most {given.most:.0%} at keep {policy.keep}; on new scenes {changed:.1%} changed")


if __name__ == "__main__":
    main()
