"""Calibrate a shipped model on 1, 2 and 3 processes and compare what each does with a model of it: docs/scaling.md.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling
    OMP_NUM_THREADS=1 python -m benchmarks.scaling --model digits_blip2 --questions 256 --processes 3 4

The model: a process's CPU time is `fixed + each * samples`, with its own share of the samples, and it receives `sums`
bytes from each process and `records` bytes for each sample of all. Each pair of numbers is that of two runs, with all
samples and with half of them, by one process and by two. What three processes do is predicted.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer
from torch import Tensor, distributed

from benchmarks.answers import QUIET, scenes_split
from catp_lightning import CrossAttentionCalibration
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.utils.files import write_json
from catp_lightning.utils.markdown import markdown_table
from catp_lightning.utils.messages import quiet

COLLECTIVES = ("all_gather", "all_reduce", "broadcast", "barrier", "all_gather_object", "broadcast_object_list")
BUDGETS = [0.5, 0.25]


@contextmanager
def counted(found: Counter[str]) -> Iterator[None]:
    """Count inside, in `found`, the collectives of this process, the bytes of tensors received, and seconds in them."""

    def noting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def noted(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            done = collective(*args, **kwargs)
            found["microseconds waited"] += round(1e6 * (time.perf_counter() - start))
            found[name] += 1
            given = args[0] if args and isinstance(args[0], Tensor | list) else []
            received = [given] if isinstance(given, Tensor) else given
            found["bytes"] += sum(one.nbytes for one in received if isinstance(one, Tensor))
            return done

        return noted

    with ExitStack() as patches:
        for name in COLLECTIVES:
            patches.enter_context(patch.object(distributed, name, noting(name, getattr(distributed, name))))
        yield


def work(model: str, scenes: Path, samples: int, batch: int, processes: int, output: Path) -> None:
    """Calibrate as one of several processes, and write what it took to a file of this process."""
    folder = str(shipped(model))
    split = VQASplit.of_scenes(scenes)
    data = VQADataModule(folder, calibration=split, batch_size=batch, prompt=PROMPTS[model])
    data.setup("calibration")
    whole = data.calibration_dataloader()
    questions = torch.utils.data.Subset(whole.dataset, range(samples))
    loader = torch.utils.data.DataLoader(questions, batch, collate_fn=whole.collate_fn)
    several = {"devices": processes, "strategy": "ddp", "accelerator": "cpu"} if processes > 1 else {}
    trainer = Trainer(**{**QUIET, **several}, callbacks=CrossAttentionCalibration(output, keep=BUDGETS, examples=0))
    module, found = VQAModule(folder), Counter[str]()
    start, cpu = time.perf_counter(), time.process_time()
    with counted(found), quiet(ours=False):
        trainer.predict(module, loader, return_predictions=False)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    write_json(output / f"process-{trainer.global_rank}.json", {**took, **found})


def run(model: str, scenes: Path, samples: int, batch: int, processes: int) -> dict[str, Any]:
    """Calibrate on several processes; return the largest of each figure over them."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        program = [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks.scaling", "--work"]
        texts = (model, scenes, samples, batch, processes, folder)
        subprocess.run([*program, *map(str, texts)], check=True)
        each = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("process-*.json"))]
        decided = [file.read_text() for file in sorted(Path(folder).glob("keep-*.json"))]
    assert len(each) == processes
    assert len(decided) == len(BUDGETS)
    figures = {key: max(one.get(key, 0) for one in each) for key in each[0]}
    return {"processes": processes, "samples": samples, **figures}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of runs beside the model's figures; the first four are those that it is made of."""
    fixed, each = _line(found[0], found[1], "cpu_seconds")
    of_two, records = _line(found[2], found[3], "bytes")
    sums, lines = of_two / 2, []
    for one in found:
        processes, samples = one["processes"], one["samples"]
        seconds = fixed + each * math.ceil(samples / processes)
        received = sums * processes + records * samples if processes > 1 else 0.0
        took = [f"{one['cpu_seconds']:.1f}", f"{seconds:.1f}", f"{one['cpu_seconds'] / seconds:.2f}"]
        sent = [
            f"{one.get('bytes', 0) / 1e6:.2f}",
            f"{received / 1e6:.2f}",
            str(sum(one.get(name, 0) for name in COLLECTIVES)),
        ]
        lines.append([str(processes), str(samples), *took, *sent])
    head = ["processes", "samples", "CPU s, each", "model", "ratio", "MB received", "model", "collectives"]
    text = f"CPU seconds of a process: {fixed:.2f} + {each:.4f} for each of its samples. Bytes that it receives: "
    text += f"{sums:,.0f} from each process + {records:,.0f} for each sample of all.\n\n"
    return text + markdown_table(head, lines)


def _line(whole: dict[str, Any], half: dict[str, Any], figure: str) -> tuple[float, float]:
    """Return what a figure is without samples, and how much it grows with each, from two runs."""
    each = (whole[figure] - half[figure]) / (whole["samples"] - half["samples"])
    return whole[figure] - each * whole["samples"], each


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        model, scenes, samples, batch, processes, output = sys.argv[2:]
        work(model, Path(scenes), int(samples), int(batch), int(processes), Path(output))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHIPPED, default="digits_llava")
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="*", default=[3], help="beside one and two")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    chosen = parser.parse_args()
    scenes_split(chosen.output, "calibration", chosen.questions, 0, GRIDS[chosen.model])
    scenes = chosen.output / "data" / "calibration"
    asked = [(samples, few) for few in (1, 2) for samples in (chosen.questions, chosen.questions // 2)]
    asked += [(chosen.questions, processes) for processes in chosen.processes]
    found = [run(chosen.model, scenes, samples, chosen.batch, processes) for samples, processes in asked]
    write_json(
        chosen.output / "scaling.json", {"torch": torch.__version__, "model": chosen.model, "runs": found}, indent=2
    )
    print(table(found))


if __name__ == "__main__":
    main()
