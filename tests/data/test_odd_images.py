"""Odd and damaged images, questions and data set files: answered, or refused by the name of what is wrong."""

import json
import math
import os
import re
import signal
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from catp_lightning import PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.vqa import VQADataModule, VQADataset, VQASplit, collate
from catp_lightning.errors import DataError, PolicyError
from catp_lightning.modules.vqa import VQAModule
from tests.support.calibrations import calibrate, data
from tests.support.fuzzing import Mutator, many
from tests.support.image_files import QUESTION, encoded, noise, split_of
from tests.support.modules import Forwarding
from tests.support.tiny_vqa import build_processor, opt_config, save_model

GREY16 = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return encoded(noise(20, 40), exif=exif.tobytes())


def animated() -> bytes:
    frames = [Image.new("P", (9, 9), number) for number in (3, 200)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)


def see_through() -> bytes:
    image = noise(12, 12).quantize(8)
    return encoded(image, transparency=bytes(range(0, 256, 32)))


ODD: dict[str, Callable[[], bytes]] = {
    "one pixel": lambda: encoded(noise(1, 1)),
    "one column": lambda: encoded(noise(1, 64)),
    "one row": lambda: encoded(noise(64, 1)),
    "three rows": lambda: encoded(noise(64, 3)),
    "three columns": lambda: encoded(noise(3, 64)),
    "a thousand to one": lambda: encoded(noise(2000, 2)),
    "16 bits, PNG": lambda: encoded(Image.fromarray(GREY16)),
    "16 bits, TIFF": lambda: encoded(Image.fromarray(GREY16), "TIFF"),
    "32 bits, TIFF": lambda: encoded(Image.fromarray(GREY16.astype(np.int32)), "TIFF"),
    "CMYK, JPEG": lambda: encoded(noise(30, 20).convert("CMYK"), "JPEG"),
    "palette with transparency": see_through,
    "grey with transparency": lambda: encoded(Image.new("LA", (9, 9), (77, 10))),
    "colour with transparency": lambda: encoded(noise(9, 9).convert("RGBA")),
    "1 bit": lambda: encoded(noise(9, 9).convert("1")),
    "animated GIF": animated,
    "turned by EXIF": rotated,
    "JPEG of another name": lambda: encoded(noise(32, 32), "JPEG"),
    "BMP of another name": lambda: encoded(noise(32, 32), "BMP"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), opt_config())


def answers(
    module: VQAModule, loader: VQADataModule, keep: float | None = 0.5, scorer: str = "catp"
) -> list[dict[str, Any]]:
    callbacks = [] if keep is None else [TokenPruning(PruningPolicy(scorer=scorer, keep=keep))]
    trainer = L.Trainer(callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False)
    return [answer for batch in trainer.predict(module, loader) or [] for answer in batch]


def test_odd_images_are_answered_pruned_in_one_batch_and_alone(tmp_path: Path, model: str) -> None:
    images = {name: make() for name, make in ODD.items()}
    module = VQAModule(model, generation={"max_new_tokens": 2})
    split = split_of(tmp_path, images)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        together, alone = (answers(module, VQADataModule(model, predict=split, batch_size=n)) for n in (len(ODD), 1))
        pixels = [example["image"] for example in map(VQADataset(split).__getitem__, range(len(ODD)))]
    assert together == alone and len(together) == len(ODD)
    assert all(image.mode == "RGB" for image in pixels)
    by_name = dict(zip(ODD, pixels, strict=True))
    for name in ("16 bits, PNG", "16 bits, TIFF", "32 bits, TIFF"):
        assert np.array_equal(np.asarray(by_name[name])[..., 0], GREY16 >> 8), name
    assert by_name["turned by EXIF"].size == (40, 20), "upright, as transformers' own loader has it"
    expected = noise(20, 40).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(by_name["turned by EXIF"]), np.asarray(expected))
    assert by_name["grey with transparency"].getpixel((0, 0)) == (77, 77, 77)
    first = Image.open(BytesIO(animated())).convert("RGB")
    assert np.array_equal(np.asarray(by_name["animated GIF"]), np.asarray(first))


@pytest.mark.parametrize("name", ["digits_llava", "digits_mllama"])
def test_odd_images_are_answered_by_the_shipped_models_too(tmp_path: Path, name: str) -> None:
    odd = ("one pixel", "three rows", "three columns", "16 bits, PNG", "palette with transparency")
    split = split_of(tmp_path, {key: ODD[key]() for key in odd})
    module = VQAModule(str(shipped(name)), generation={"max_new_tokens": 1})
    loader = VQADataModule(str(shipped(name)), predict=split, prompt=PROMPTS[name], batch_size=len(odd))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        assert len(answers(module, loader, scorer="stride")) == len(odd)


def test_a_damaged_exif_turns_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    for kind, exif in (
        ("JPEG", b"Exif\0\0junk"),
        ("JPEG", b"Exif\0\0II*\0\xff\xff\xff\xff"),
        ("PNG", b"Exif\0\xd7MM\0*"),
    ):
        content = encoded(noise(8, 8), kind, exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow says that it is corrupt
            image = VQADataset(split_of(tmp_path, {"x": content}))[0]["image"]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_an_image_cut_off_anywhere_is_refused_by_name_or_whole(tmp_path: Path, kind: str) -> None:
    content = encoded(noise(40, 40).convert("P") if kind == "GIF" else noise(40, 40), kind)
    whole, refused = np.asarray(Image.open(BytesIO(content)).convert("RGB")), 0
    split = split_of(tmp_path, {"x": content})
    dataset = VQADataset(split)
    for length in range(0, len(content), max(1, len(content) // 60)):
        Path(split.images, "0.png").write_bytes(content[:length])
        try:
            image = dataset[0]["image"]
        except DataError as error:
            refused += "0.png, the image of question 0, cannot be read" in str(error)
        else:
            assert np.array_equal(np.asarray(image), whole), "only what follows the pixels was missing"
    assert refused >= 55


def test_what_is_no_image_file_at_all_is_refused_at_once(tmp_path: Path) -> None:
    split = split_of(tmp_path, {"x": b""})
    place, dataset = Path(split.images, "0.png"), VQADataset(split)
    place.unlink()
    os.mkfifo(place)

    def too_late(*_: Any) -> None:
        raise TimeoutError("opening a pipe waits for somebody to write")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(30)
    try:
        with pytest.raises(DataError, match=r"0\.png, .* cannot be read: it is no file"):
            dataset[0]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    place.unlink()
    place.mkdir()
    with pytest.raises(DataError, match=r"0\.png, .* cannot be read: it is no file"):
        dataset[0]
    place.rmdir()
    place.symlink_to(place)
    with pytest.raises(DataError, match="cannot be read"):
        dataset[0]
    place.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        dataset[0]


def test_an_image_of_too_many_pixels_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side, refused in ((30, False), (40, True), (80, True)):  # more than allowed, and more than twice as many
        dataset = VQADataset(split_of(tmp_path, {"x": encoded(Image.new("1", (side, side)))}))
        if refused:
            with pytest.raises(
                DataError, match=r"pixels, more than 1,000, the lower of|exceeds limit of \d+ pixels, could be"
            ):
                dataset[0]
        else:
            assert dataset[0]["image"].size == (30, 30)


def test_pixels_without_a_known_black_and_white_are_refused(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)), "TIFF")
    with pytest.raises(DataError, match="floating-point numbers"):
        VQADataset(split_of(tmp_path, {"x": content}))[0]


QUESTIONS = {
    "empty": "",
    "spaces": "   ",
    "control characters": "a\x00b\x07\x1b[31m\r\n\x7f",
    "right to left": "\u202eكم رقم هناك؟",
    "emoji": "👩\u200d👩\u200d👧 how many \U0001f9ff?",
    "braces": "{} {0} {image} %s",
    "marks of other models": "what is <|image|> and [INST] here",
    "half a combined character": "e\u0301 \u0301",
}


@pytest.mark.parametrize("name", ["digits_blip2", "digits_llava"])
def test_odd_questions_are_answered_pruned_whatever_stands_beside_them(tmp_path: Path, name: str) -> None:
    folder = str(shipped(name))
    split = split_of(tmp_path, {"x": encoded(noise(64, 64))}, [*QUESTIONS.values(), QUESTION])
    module = VQAModule(folder, generation={"max_new_tokens": 2})
    for keep in (None, 0.5):
        loaders = [VQADataModule(folder, predict=split, prompt=PROMPTS[name], batch_size=n) for n in (20, 1)]
        together, alone = (answers(module, loader, keep, "stride") for loader in loaders)
        assert together == alone and len(together) == len(QUESTIONS) + 1


def refused_by_its_number(tmp_path: Path, name: str, question: str) -> None:
    split = split_of(tmp_path, {"x": encoded(noise(64, 64))}, [QUESTION, question])
    loader = VQADataModule(str(shipped(name)), predict=split, prompt=PROMPTS[name])
    mark = question.split()[1]
    with pytest.raises(DataError, match=re.escape(f"Question 10, {question!r}, holds {mark!r}")):
        next(iter(loader.predict_dataloader()))


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("digits_blip2", "is <image> here?"),
        ("digits_llava", "is <image> here?"),
        ("digits_mllama", "is <|image|> here?"),
    ],
)
def test_a_question_that_holds_the_image_token_is_refused_by_its_number(
    tmp_path: Path, name: str, question: str
) -> None:
    refused_by_its_number(tmp_path, name, question)


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("digits_blip2", "is </s> here?"),
        ("digits_llava", "is <pad> here?"),
        ("digits_llava", "is <unk> here?"),
        ("digits_mllama", "is <|begin_of_text|> here?"),
    ],
)
def test_a_question_that_holds_a_special_token_is_refused_by_its_number(
    tmp_path: Path, name: str, question: str
) -> None:
    refused_by_its_number(tmp_path, name, question)


def test_a_raw_batch_whose_placeholders_are_not_those_of_its_images_is_never_answered() -> None:
    """Where only the sum is right, transformers puts one sample's features into another; pruning does not."""
    folder = shipped("digits_llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    images, text = [[noise(96, 96)]] * 2, [f"<image> {QUESTION}"] * 2
    inputs = dict(processor(images=images, text=text, return_tensors="pt"))
    token, ids = processor.image_token_id, inputs["input_ids"]
    first, word = int((ids[0] == token).nonzero()[0]), int(ids[0, -1])
    with torch.no_grad(), prune(model.eval(), PruningPolicy(scorer="stride", keep=0.5)):
        fewer = ids.clone()
        fewer[0, first] = word
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            model(**{**inputs, "input_ids": fewer})
        moved = fewer.clone()
        moved[1, -1] = token  # the sum is right again
        with pytest.raises(PruningError, match=r"sample 0 does not end where an image ends"):
            model(**{**inputs, "input_ids": moved})
        model(**inputs)


def test_a_prompt_without_the_image_token_is_refused_where_the_model_wants_one(tmp_path: Path) -> None:
    split = split_of(tmp_path, {"x": encoded(noise(64, 64))})
    for name, says in (
        ("digits_llava", r"has no image token|LlavaProcessor cannot take question 0"),
        ("digits_mllama", r"MllamaProcessor cannot take question 0"),
    ):
        loader = VQADataModule(str(shipped(name)), predict=split)
        with pytest.raises(DataError, match=says):
            next(iter(loader.predict_dataloader()))


def test_a_question_longer_than_the_models_positions_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    folder = str(shipped("digits_blip2"))
    module = VQAModule(folder, generation={"max_new_tokens": 5})
    for words, fits in ((80, True), (100_000, False)):
        split = split_of(tmp_path, {"x": encoded(noise(64, 64))}, [QUESTION, "how " * words])
        loader = VQADataModule(folder, predict=split)
        if fits:
            assert len(answers(module, loader)) == 2
            continue
        with pytest.raises(DataError, match=r"question 10 has 100,\d+ tokens, .* has 128 positions"):
            answers(module, loader)


def test_a_token_that_a_processor_does_without_marks_no_question(tmp_path: Path) -> None:
    processor = build_processor()
    processor.video_token = None
    split = split_of(tmp_path, {"x": encoded(noise(64, 64))}, ["None of the above?"])
    batch = collate([VQADataset(split)[0]], processor, "question : {}")
    assert batch["question_ids"].tolist() == [0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question": "a\ud800b"}, "'question' is 'a.ud800b', which is no text"),
        ({"question_id": 2**63}, "'question_id' is 9223372036854775808; an id is a whole number of 64 bits"),
        ({"image_id": -(2**70)}, "'image_id' is -1180591620717411303424; an id is a whole number of 64 bits"),
        ({"image_id": 1.0}, "'image_id' must be int, got 1.0"),
        ({"image_id": 10**300}, "'image_id' is 1000"),
    ],
)
def test_ids_and_texts_that_no_tensor_and_no_tokenizer_takes_are_refused_when_the_file_is_read(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    split = split_of(tmp_path, {"x": encoded(noise(8, 8))})
    record = {"question_id": 0, "image_id": 0, "question": QUESTION, **change}
    Path(split.questions).write_text(json.dumps({"questions": [record]}))
    with pytest.raises(DataError, match=says):
        VQADataset(split)


@pytest.mark.parametrize("name", ["{image_id.x}.png", "{image_id[0]}.png", "{image_id.__class__}"])
def test_an_image_name_that_asks_for_more_than_the_id_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="Use the field image_id"):
        VQASplit("questions.json", "images", image_name=name)


def test_a_folder_of_images_that_no_folder_can_be_is_refused(tmp_path: Path) -> None:
    split = split_of(tmp_path, {"x": encoded(noise(8, 8))})
    split.images = "x" * 5000
    with pytest.raises(DataError, match=r"folder of images 'xxx.* cannot be read"):
        VQADataset(split)


def fuzz_data(count: int, place: Path, canary: Path) -> None:
    """Questions and annotations in turn: read to the last item, or refused."""
    split = split_of(place, {"x": encoded(noise(4, 4)), "y": encoded(noise(3, 5))})
    split.annotations = str(place / "annotations.json")
    ten = [{"answer": "yes", "answer_id": number} for number in range(10)]
    documents = {
        "questions": json.loads(Path(split.questions).read_text()) | {"info": {"year": 2014}},
        "annotations": {"annotations": [{"question_id": number, "image_id": 0, "answers": ten} for number in (0, 10)]},
    }
    for name, document in documents.items():
        (place / f"{name}.json").write_text(json.dumps(document))
    whole = {name: (place / f"{name}.json").read_bytes() for name in documents}

    def each(seed: int) -> bool:
        mutator, name = Mutator(seed, canary), ("questions", "annotations")[seed % 2]
        content = mutator.document(documents[name]) if seed % 3 else mutator.bytes(whole[name])
        (place / f"{name}.json").write_bytes(content)
        try:
            dataset = VQADataset(split)
            for number in range(len(dataset)):
                example = dataset[number]
                assert len(example["answers"]) == 10 and example["question"].encode() is not None
                torch.tensor([example["question_id"], example["image_id"]])
        except DataError:
            return False
        finally:
            (place / f"{name}.json").write_bytes(whole[name])
        return True

    assert 0.01 * count < many(count, each) < 0.9 * count


def fuzz_images(count: int, place: Path, canary: Path) -> None:
    contents = [make() for name, make in ODD.items() if "thousand" not in name and "64" not in name]
    split = split_of(place, {"x": contents[0]})
    dataset, file = VQADataset(split), Path(split.images, "0.png")

    def each(seed: int) -> bool:
        file.write_bytes(Mutator(seed, canary).bytes(contents[seed % len(contents)]))
        try:
            image = dataset[0]["image"]
        except DataError:
            return False
        assert image.mode == "RGB" and math.prod(image.size) > 0
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says what it meets
        assert 0.01 * count < many(count, each) < 0.99 * count


def test_damaged_data_sets_and_images_are_read_or_refused(tmp_path: Path, canary: Path) -> None:
    fuzz_data(400, tmp_path / "data", canary)
    fuzz_images(300, tmp_path / "images", canary)


@pytest.mark.slow
def test_fifty_thousand_damaged_data_sets_and_images_are_read_or_refused(tmp_path: Path, canary: Path) -> None:
    fuzz_data(35_000, tmp_path / "data", canary)
    fuzz_images(15_000, tmp_path / "images", canary)


@pytest.mark.parametrize("size", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_samples_whose_answer_is_no_number_are_left_out_of_a_calibration_and_counted(size: int, tmp_path: Path) -> None:
    batches = data(40, size)
    for row in (3, 17):
        batches[row // size]["pixel_values"][row % size, :, :4] = float("nan")
    with pytest.warns(UserWarning, match="2 samples were left out, to which the unpruned model's own answer is not a"):
        policy = calibrate(Forwarding(), batches, tmp_path / "p.json", keep=4).policies[0]
    assert sum(policy.evidence["samples"].values()) == 38
    assert math.isfinite(policy.evidence["candidates"][0]["choose"]["divergence"])
    for batch in batches:
        batch["pixel_values"][:] = float("nan")
    with pytest.raises(PolicyError, match=r"got \{'learn': 0, 'check': 0\}.* 40 samples were left out"):
        calibrate(Forwarding(), batches, tmp_path / "q.json")
