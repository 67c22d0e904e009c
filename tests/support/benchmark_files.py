"""Small data sets in the layouts of the official files, and their readers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from catp_lightning.data.benchmarks import GQA, POPE, DocVQA, EasyVQA, OCRBench, Reader, TextVQA, VizWiz
from tests.support.benchmark_tasks import mmbench, mme, refcoco, scienceqa
from tests.support.benchmark_videos import mvbench, videomme
from tests.support.benchmark_writing import write_images, write_json, write_lines


def pope(folder: Path, **change: Any) -> POPE:
    """Six questions about three images; `change` replaces fields of the second."""
    objects = [("snowboard", "yes"), ("dog", "no"), ("car", "yes"), ("cup", "no"), ("person", "yes"), ("bus", "no")]
    records: list[dict[str, Any]] = [
        {
            "question_id": number + 1,
            "image": f"COCO_val2014_{number // 2:012d}.jpg",
            "text": f"Is there a {name} in the image?",
            "label": label,
        }
        for number, (name, label) in enumerate(objects)
    ]
    images = write_images(folder / "val2014", dict.fromkeys(record["image"] for record in records))
    records[1].update(change)
    return POPE(write_lines(folder / "coco_pope_random.json", records), images)


def gqa(folder: Path, **change: Any) -> GQA:
    """Four questions about two images, of which the last is not balanced; `change` replaces fields of the second."""
    answers = [("Is it cloudy?", "yes"), ("Which color is the bus?", "red"), ("Is it old?", "no"), ("Who runs?", "man")]
    content: dict[str, dict[str, Any]] = {
        f"0{20131 + number}": {
            "semantic": [],
            "entailed": [],
            "equivalent": [],
            "question": question,
            "imageId": f"n{number // 2}",
            "isBalanced": number < 3,
            "groups": {"global": None, "local": ""},
            "answer": answer,
            "semanticStr": "",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "", "semantic": "global", "structural": "verify"},
            "fullAnswer": f"It is {answer}.",
        }
        for number, (question, answer) in enumerate(answers)
    }
    images = write_images(folder / "images", ["n0.jpg", "n1.jpg"])
    content["020132"].update(change)
    return GQA(write_json(folder / "testdev_balanced_questions.json", content), images)


def easyvqa(folder: Path, second: Any = None) -> EasyVQA:
    """Four questions about two images; `second` stands in the place of the second question."""
    content: list[Any] = [
        ["what is the red shape?", "triangle", 0],
        ["is there not a black shape in the image?", "yes", 0],
        ["what color is the rectangle?", "teal", 1],
        ["does the image contain a circle?", "no", 1],
    ]
    write_images(folder / "images", ["0.png", "1.png"])
    if second is not None:
        content[1] = second
    write_json(folder / "questions.json", content)
    return EasyVQA(str(folder))


def textvqa(folder: Path, **change: Any) -> TextVQA:
    """Three questions about two images; `change` replaces fields of the second."""
    answers = [["nokia"] * 10, ["copenhagen"] * 6 + ["tuborg", "tubor", "Copenhagen.", "unknown"], ["7"] * 10]
    records: list[dict[str, Any]] = [
        {
            "question": question,
            "image_id": ("003a8ae2ef43b901", "02685c6f63b1bd66")[number // 2],
            "image_classes": ["Cassette deck", "Printer"],
            "flickr_original_url": "https://farm2.staticflickr.com/4/o.jpg",
            "flickr_300k_url": "https://c6.staticflickr.com/4/z.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": answers[number],
            "question_tokens": question.lower().rstrip("?").split(),
            "question_id": 34602 + number,
            "set_name": "val",
        }
        for number, question in enumerate(["what is the brand?", "what beer is it?", "what number is there?"])
    ]
    images = write_images(folder / "train_images", [f"{records[0]['image_id']}.jpg", f"{records[2]['image_id']}.jpg"])
    records[1].update(change)
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": records}
    return TextVQA(write_json(folder / "TextVQA_0.5.1_val.json", content), images)


def vizwiz(folder: Path, **change: Any) -> VizWiz:
    """Three questions about an image each; `change` replaces fields of the second."""
    answers = [["grey"] * 5 + ["gray"] * 5, ["unanswerable"] * 8 + ["no", "yes"], ["soup"] * 10]
    records: list[dict[str, Any]] = [
        {
            "image": f"VizWiz_val_{number:08d}.jpg",
            "question": question,
            "answers": [{"answer_confidence": "maybe", "answer": answer} for answer in answers[number]],
            "answer_type": "other",
            "answerable": 1,
        }
        for number, question in enumerate(["What color is it?", "Is it on?", "What is in the can?"])
    ]
    images = write_images(folder / "val", [record["image"] for record in records])
    records[1].update(change)
    return VizWiz(write_json(folder / "val.json", records), images)


def docvqa(folder: Path, **change: Any) -> DocVQA:
    """Three questions about two pages; `change` replaces fields of the second."""
    answers = [["1/8/93"], ["ITC Limited", "itc limited"], ["0.28"]]
    records: list[dict[str, Any]] = [
        {
            "questionId": 49153 + number,
            "question": question,
            "question_types": ["form"],
            "image": f"documents/pybv0228_{81 + number // 2}.png",
            "docId": 14465,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": str(81 + number // 2),
            "answers": answers[number],
            "data_split": "val",
        }
        for number, question in enumerate(["What is the date?", "Which company is it?", "What is the value?"])
    ]
    images = write_images(folder / "spdocvqa_images", ["pybv0228_81.png", "pybv0228_82.png"])
    records[1].update(change)
    content = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": records}
    return DocVQA(write_json(folder / "val_v1.0_withQT.json", content), images)


def ocrbench(folder: Path, **change: Any) -> OCRBench:
    """Four questions of four kinds, two of which have one id; `change` replaces fields of the second."""
    rows = [
        ("IIIT5K", "IIIT5K/test/1.png", "what is written in the image?", ["CENTRE"], "Regular Text Recognition"),
        ("STVQA", "STVQA/VisualGenome/2/7.jpg", "What airline is this?", ["Airfrance", "Air france"],
         "Scene Text-centric VQA"),
        ("docVQA", "docVQA/val/documents/7.png", "What is the date?", "1/8/93", "Doc-oriented VQA"),
        ("HME100k", "HME100K/test/1.jpg", "Please write out the formula.", "x _ { 1 } = 0\n",
         "Handwritten Mathematical Expression Recognition"),
    ]  # fmt: skip
    records: list[dict[str, Any]] = [
        {"dataset_name": name, "id": 7, "image_path": path, "question": question, "answers": answers, "type": kind}
        for name, path, question, answers, kind in rows
    ]
    images = write_images(folder / "OCRBench_Images", [record["image_path"] for record in records])
    records[1].update(change)
    return OCRBench(write_json(folder / "OCRBench.json", records), images)


DATA_SETS: Mapping[str, Callable[..., Reader]] = {
    "docvqa": docvqa,
    "easyvqa": easyvqa,
    "gqa": gqa,
    "mmbench": mmbench,
    "mme": mme,
    "mvbench": mvbench,
    "ocrbench": ocrbench,
    "pope": pope,
    "refcoco": refcoco,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "videomme": videomme,
    "vizwiz": vizwiz,
}
"""A function that writes each data set and returns its reader, by the name of its metric."""
