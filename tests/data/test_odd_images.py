"""Odd and damaged images: answered, or refused by the name of what is wrong."""

import os
import signal
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.vqa import VQADataModule, VQADataset
from catp_lightning.errors import DataError
from catp_lightning.modules.vqa import VQAModule
from tests.support.image_files import GREY16, ODD, animated, answers, encoded, noise, split_of


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        with pytest.raises(DataError, match=r"0\.png, .* cannot be read: it is not a file"):
            dataset[0]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    place.unlink()
    place.mkdir()
    with pytest.raises(DataError, match=r"0\.png, .* cannot be read: it is not a file"):
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
