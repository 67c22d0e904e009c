"""Small data sets whose answers are options, judgements or boxes, in the layouts of the official files."""

import base64
import csv
from pathlib import Path
from typing import Any

from catp_lightning.data.benchmarks import MME, MMBench, RefCOCO, ScienceQA
from tests.support.benchmark_writing import write_images, write_json, write_lines


def scienceqa(folder: Path, **change: Any) -> ScienceQA:
    """Five problems, of which three are in the test split and have images; `change` replaces fields of the second."""
    problems: dict[str, dict[str, Any]] = {
        str(number + 1): {
            "question": f"Which is number {number}?",
            "choices": ["zero", "one", "two", "three"][: 2 + number % 3],
            "answer": number % 2,
            "hint": "" if number else "Count.",
            "image": None if number == 3 else "image.png",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "Materials",
            "skill": "Compare",
            "lecture": "",
            "solution": "",
            "split": "train" if number == 4 else "test",
        }
        for number in range(5)
    }
    write_images(folder / "images", [f"test/{number}/image.png" for number in (1, 2, 3)])
    problems["2"].update(change)
    write_json(folder / "pid_splits.json", {"train": ["5"], "val": ["4"], "test": ["3", "1", "4", "2"]})
    write_json(folder / "problems.json", problems)
    return ScienceQA(str(folder))


COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "split",
)


def mmbench(folder: Path, **change: Any) -> MMBench:
    """A question with three options in each order, and one with two in one order; `change` replaces cells of the first.

    The first question's hint has a line break, a tab and quotes; rotations refer to its image.
    """
    names = write_images(folder, ["1.png", "2.png"])
    first, second = (base64.b64encode(Path(names, name).read_bytes()).decode() for name in ("1.png", "2.png"))
    options = ["sky", "grass", "sea"]
    rows = [
        dict(zip("ABC", options[turn:] + options[:turn], strict=True))
        | {
            "index": 241 + turn * 10**6,
            "question": "Which is blue?",
            "hint": 'Look "up".\nAnd\tdown.',
            "D": "",
            "answer": "ACB"[turn],
            "image": "241" if turn else first,
        }
        for turn in range(3)
    ]
    rows.append(
        {"index": 7, "question": "Is it?", "hint": "nan", "A": "yes", "B": "no", "answer": "B", "image": second}
    )
    rows[0].update(change)
    path = folder / "MMBench_DEV_EN.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return MMBench(str(path))


def mme(folder: Path) -> MME:
    """Two images of "existence", whose texts stand beside them, and one of "artwork", whose texts stand apart."""
    texts = {
        "existence/000000006040.txt": "Is there a bus? Please answer yes or no.\tYes\nIs there a cat?\tNo\n",
        "existence/000000007816.txt": "Is there a car?\tYes\nIs there a cup?\tNo\n\n",
        "artwork/questions_answers_YN/10002.txt": "Is it a painting?\tYes\nIs it glassware?\tNo",
        "eval_tool/Your_Results/existence.txt": "no question\n",
    }
    images = ["existence/000000006040.jpg", "existence/000000007816.png", "artwork/images/10002.jpg"]
    place = folder / "MME_Benchmark_release_version"
    write_images(place, images)
    for name, text in texts.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")
    return MME(str(place))


def refcoco(folder: Path, scale: float | None = None, **change: Any) -> RefCOCO:
    """Three expressions about two images; `change` replaces fields of the second."""
    records: list[dict[str, Any]] = [
        {
            "image": f"data/coco/train2014/COCO_train2014_{number // 2:012d}.jpg",
            "sent": sent,
            "bbox": [1, 2, 11.5, 12 + number],
            "height": 24,
            "width": 32,
        }
        for number, sent in enumerate(["the left man", "dog on the right", "blue bus"])
    ]
    images = write_images(folder / "coco", dict.fromkeys(record["image"] for record in records))
    records[1].update(change)
    return RefCOCO(write_lines(folder / "refcoco_testA.jsonl", records), images, scale)
