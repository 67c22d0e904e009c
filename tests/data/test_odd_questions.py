"""Odd questions and prompts: answered, or refused by the name of what is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.vqa import VQADataModule, VQADataset, collate
from catp_lightning.errors import DataError
from catp_lightning.modules.vqa import VQAModule
from tests.support.image_files import QUESTION, answers, encoded, noise, split_of
from tests.support.processors import needs_processors_of_qwen
from tests.support.tiny_vqa import build_processor

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["digits_blip2", "digits_llava", pytest.param("digits_qwen2_5_vl", marks=needs_processors_of_qwen)]
)
def test_odd_questions_are_answered_pruned_whatever_stands_beside_them(tmp_path: Path, name: str) -> None:
    folder = str(shipped(name))
    split = split_of(tmp_path, {"x": encoded(noise(64, 64))}, [*QUESTIONS.values(), QUESTION])
    module = VQAModule(folder, generation={"max_new_tokens": 2})
    loaders = [VQADataModule(folder, predict=split, prompt=PROMPTS[name], batch_size=n) for n in (20, 1)]
    together, alone = (answers(module, loader, 0.5, "stride") for loader in loaders)
    assert together == alone and len(together) == len(QUESTIONS) + 1


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("digits_blip2", "<image>"),
        ("digits_llava", "<image>"),
        ("digits_mllama", "<|image|>"),
        ("digits_blip2", "</s>"),
        ("digits_llava", "<pad>"),
        ("digits_llava", "<unk>"),
        ("digits_mllama", "<|begin_of_text|>"),
        pytest.param("digits_qwen2_5_vl", "<|image_pad|>", marks=needs_processors_of_qwen),
        pytest.param("digits_qwen2_5_vl", "<|vision_start|>", marks=needs_processors_of_qwen),
    ],
)
def test_a_question_that_holds_the_image_token_or_a_special_one_is_refused_by_its_number(
    tmp_path: Path, name: str, mark: str
) -> None:
    question = f"is {mark} here?"
    split = split_of(tmp_path, {"x": encoded(noise(64, 64))}, [QUESTION, question])
    loader = VQADataModule(str(shipped(name)), predict=split, prompt=PROMPTS[name])
    with pytest.raises(DataError, match=re.escape(f"Question 10, {question!r}, holds {mark!r}")):
        next(iter(loader.predict_dataloader()))


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


@pytest.mark.slow
def test_a_question_longer_than_the_models_positions_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    folder = str(shipped("digits_blip2"))
    module = VQAModule(folder, generation={"max_new_tokens": 5})
    for words, fits in ((80, True), (10_000, False)):
        split = split_of(tmp_path, {"x": encoded(noise(64, 64))}, [QUESTION, "how " * words])
        loader = VQADataModule(folder, predict=split)
        if fits:
            assert len(answers(module, loader)) == 2
            continue
        with pytest.raises(DataError, match=r"question 10 has 10,\d+ tokens, .* has 128 positions"):
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
        ({"question": "a\ud800b"}, "'question' is 'a.ud800b', which is not text"),
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
