"""The commands `catp demo` and `catp scenes`: options are parsed before anything that takes long is imported."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from jsonargparse import ArgumentParser

from catp_lightning.cli.options import parsed
from catp_lightning.data import GRIDS, shipped
from catp_lightning.errors import did_you_mean
from catp_lightning.safe_text import one_line
from catp_lightning.utils.files import require_writable
from catp_lightning.utils.progress import Preparation


def scenes(args: list[str], summary: str, preparation: Preparation) -> None:
    """Run `catp scenes`; `args` are the arguments after `scenes`."""

    def write(
        output: str | None = None,
        questions: int = 1000,
        calibration_questions: int = 512,
        seed: int = 0,
        model: str = "digits_blip2",
        shift: str | None = None,
    ) -> None:
        """Write digit scenes with questions.

        Args:
            output: the folder that gets `calibration` and `test`, in VQAv2's layout; no digit is in both. By default
                the one that the model's configuration reads: data/digits, data/digits_llava and so on.
            questions: number of questions of the test split.
            calibration_questions: number of questions of the calibration split.
            seed: seed of the scenes and questions.
            model: the shipped model that the scenes are for: digits_blip2, digits_llava, digits_mllama or
                digits_qwen2_5_vl.
            shift: how the test split differs from the calibration split: noisy, moved, crowded, other-questions,
                detail (smaller digits) or several-turns (a question after another one and its answer); none by default.
        """
        shipped(model)  # raises where it is not a shipped one
        output = output or ("data/digits" if model == "digits_blip2" else f"data/{model}")
        _check(output, seed, {"calibration": calibration_questions, "test": questions})
        from catp_lightning.data.scenes import Split
        from catp_lightning.data.shifts import SHIFTS, Shift

        if shift is not None and shift not in SHIFTS:
            raise ValueError(f"shift is {shift!r:.200}; known are {', '.join(SHIFTS)}.{did_you_mean(shift, SHIFTS)}")
        preparation.over = True
        counts: dict[Split, int] = {"calibration": calibration_questions, "test": questions}
        for split, count in counts.items():
            preparation.lines.now = f"scenes: {count} questions of the {split} split"
            drawn = SHIFTS[shift] if shift is not None and split == "test" else Shift()
            place = drawn.write(os.path.join(output, split), split, count, seed, GRIDS[model])
            print(one_line(f"{count} questions in {place}"), flush=True)

    _call("scenes", write, args, summary)


def demo(args: list[str], summary: str, preparation: Preparation) -> None:
    """Run `catp demo`; `args` are the arguments after `demo`."""

    def run(output: str = "runs/demo", questions: int = 500, calibration_questions: int = 512, seed: int = 0) -> None:
        """Run the demo on the shipped BLIP-2.

        Args:
            output: folder for the results: policies, table, plot and an offline Weights & Biases run.
            questions: number of test questions, about digits that neither training nor calibration saw.
            calibration_questions: number of questions the policies are chosen on.
            seed: seed of the scenes.
        """
        _check(output, seed, {"calibration": calibration_questions, "test": questions})
        print("The demo takes about two minutes where nothing else runs; importing torch comes first.", flush=True)
        from catp_lightning.cli.demo import run_demo

        preparation.end()
        run_demo(output, questions, calibration_questions, seed, preparation)

    _call("demo", run, args, summary)


def _check(output: str, seed: int, counts: Mapping[str, int]) -> None:
    """Raise ValueError if scenes cannot be drawn with this seed or these counts, OSError if not written to `output`."""
    if few := [f"{count} for the {split} split" for split, count in counts.items() if count < 1]:
        raise ValueError(f"The number of questions is {' and '.join(few)}; it must be at least 1.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0.")
    require_writable(Path(output), folder=True)


def _call(name: str, function: Callable[..., None], args: list[str], summary: str) -> None:
    parser = ArgumentParser(
        prog=f"catp {name}", usage=f"catp {name} [options]", description=summary, exit_on_error=False
    )
    parser.add_argument("-c", "--config", action="config", help="A YAML file with these options.")
    parser.add_function_arguments(function)
    chosen = parsed(parser, args).as_dict()
    function(**{key: value for key, value in chosen.items() if key != "config"})
