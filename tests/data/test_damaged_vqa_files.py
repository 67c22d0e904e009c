"""Damaged files of a VQA split are reported by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.vqa import VQADataModule, VQADataset, VQASplit
from catp_lightning.errors import DataError
from tests.support.image_files import encoded, noise, split_of
from tests.support.tiny_vqa import scenes
from tests.support.vqa_files import edit, questions_of, rewrite


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def to_folder(folder: Path) -> None:
    remove("annotations.json")(folder)
    (folder / "annotations.json").mkdir()


def cut(folder: Path) -> None:
    path = folder / "questions.json"
    path.write_bytes(path.read_bytes()[:-20])


def bytes_that_are_not_text(folder: Path) -> None:
    (folder / "questions.json").write_bytes(b"\xff\xfe\xff")


DAMAGE = [
    (remove("questions.json"), r"questions\.json: there is no such file"),
    (remove("annotations.json"), r"annotations\.json: there is no such file"),
    (to_folder, "cannot be read: it is a folder, not a regular file"),
    (cut, r"questions\.json is not valid JSON"),
    (bytes_that_are_not_text, "is not valid JSON"),
    (rewrite("questions", lambda content: content["questions"]), "must be an object with a list 'questions'"),
    (rewrite("annotations", lambda c: {"answers": c["annotations"]}), "must be an object with a list 'annotations'"),
    (edit("questions", list.clear), "that is not empty"),
    (edit("questions", lambda q: q.insert(1, "x")), r"question number 1 .*'question_id' must be int"),
    (edit("questions", lambda q: q[2].pop("question")), "question number 2 .*'question' must be str, got None"),
    (edit("questions", lambda q: q[2].update(image_id="7")), "'image_id' must be int, got '7'"),
    (edit("questions", lambda q: q[2].update(image_id=True)), "'image_id' must be int, got True"),
    (edit("questions", lambda q: q.append(q[0])), r"question number 6: question_id \d+ is there twice"),
    (edit("annotations", lambda a: a.append(a[0])), r"annotation number 6: question_id \d+ is there twice"),
    (edit("annotations", lambda a: a.pop(1)), r"no annotation for 1 of 6 questions, .* question_id 200000000001\."),
    (edit("annotations", lambda a: a[0].pop("answers")), "annotation of question .*'answers' must be list, got None"),
    (edit("annotations", lambda a: a[0].update(answers=["yes"])), "'answer' must be str, got None"),
    (edit("annotations", lambda a: a[0]["answers"].pop()), "9 answers, but VQA accuracy is defined for 10"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_files_are_reported_at_setup(tmp_path, processor, damage, message):
    data = VQADataModule(processor, val=scenes(tmp_path, 6))
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        data.setup("validate")
    assert str(tmp_path) in str(caught.value)


def test_missing_images_are_counted_and_the_first_named(tmp_path, processor):
    split = scenes(tmp_path, 12)
    files = sorted(Path(split.images).iterdir())
    for file in files[1:]:
        file.unlink()
    with pytest.raises(DataError, match="5 of 6 image files") as caught:
        VQADataModule(processor, test=split).setup("test")
    assert [file.name in str(caught.value) for file in files] == [False, True, True, True, False, False]
    split.images = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match="6 of 6 image files"):
        VQADataset(split)


def damage_image(split: VQASplit, damage: str) -> str:
    """The last image, and so the last two questions."""
    file = sorted(Path(split.images).iterdir())[-1]
    content = file.read_bytes()
    broken = {
        "not an image": b"<html>404</html>",
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "a chunk overwritten": content[:60] + bytes(40) + content[100:],
    }
    file.write_bytes(broken[damage])
    return file.name


@pytest.mark.parametrize(
    ("damage", "workers"),
    [("not an image", 0), ("empty", 0), ("truncated", 0), ("a chunk overwritten", 0), ("truncated", 1)],
)
def test_damaged_image_is_named_when_it_is_read(tmp_path, processor, damage, workers):
    split = scenes(tmp_path, 4)
    name = damage_image(split, damage)
    data = VQADataModule(processor, val=split, batch_size=2, num_workers=workers)
    data.setup("validate")
    batches = iter(data.val_dataloader())
    next(batches)  # images are read as they come: the first two questions are fine
    with pytest.raises(
        DataError, match=rf"{name}, the image of question {questions_of(split)[2]['question_id']}, cannot"
    ):
        next(batches)


@pytest.mark.slow
def test_json_nested_without_end_is_said_not_crashed_on(tmp_path):
    (tmp_path / "questions.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not valid JSON"):
        VQADataset(VQASplit(str(tmp_path / "questions.json"), str(tmp_path)))


def without(folder: Path, name: str, *settings: str) -> str:
    """A shipped model's processor as older versions saved it."""
    shutil.copytree(shipped(name), folder)
    path = folder / "processor_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in settings}
    path.write_text(json.dumps(kept))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("digits_blip2", ["num_query_tokens"], "Blip2Processor has no num_query_tokens, .*config.num_query_tokens"),
        ("digits_llava", ["patch_size"], "LlavaProcessor has no patch_size, .*config.vision_config.patch_size"),
        (
            "digits_llava",
            ["patch_size", "vision_feature_select_strategy"],
            "LlavaProcessor has no patch_size and vision_feature_select_strategy, .*config.vision_config.patch_size",
        ),
    ],
)
def test_a_processor_that_cannot_place_an_image_is_refused_by_what_it_lacks(tmp_path, name, settings, says):
    old, split = without(tmp_path / "old", name, *settings), scenes(tmp_path / "scenes", 2)
    data = VQADataModule(old, val=split, prompt=PROMPTS[name])
    with pytest.raises(DataError, match=says) as error:
        next(iter(data.val_dataloader()))
    assert "Question" not in str(error.value)
    whole = VQADataModule(str(shipped(name)), val=split, prompt=PROMPTS[name])
    assert len(next(iter(whole.val_dataloader()))["question_ids"]) == 2


def test_a_folder_of_images_that_no_folder_can_be_is_refused(tmp_path: Path) -> None:
    split = split_of(tmp_path, {"x": encoded(noise(8, 8))})
    split.images = "x" * 5000
    with pytest.raises(DataError, match=r"folder of images 'xxx.* cannot be read"):
        VQADataset(split)
