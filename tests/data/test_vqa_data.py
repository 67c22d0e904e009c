"""VQADataModule: batches hold what the files of a split say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from catp_lightning.data.vqa import VQADataModule, VQADataset, VQASplit
from catp_lightning.errors import DataError
from catp_lightning.modules.vqa import VQAModule
from tests.support.tiny_vqa import QUERIES, build_processor, opt_config, save_model, scenes
from tests.support.vqa_files import edit, questions_of


def ids(loader) -> list[int]:
    return [number for batch in loader for number in batch["question_ids"].tolist()]


def test_batches_hold_what_the_files_say(tmp_path, processor):
    split = scenes(tmp_path, 10)
    data = VQADataModule(processor, val=split, batch_size=4)
    batches = list(data.val_dataloader())
    assert [len(batch["question_ids"]) for batch in batches] == [4, 4, 2]
    tokenizer = build_processor().tokenizer
    asked = iter(questions_of(split))
    for batch in batches:
        inputs = batch["inputs"]
        assert type(inputs) is dict
        assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
        assert batch["question_ids"].dtype == batch["image_ids"].dtype == torch.int64
        for row in range(len(batch["question_ids"])):
            question = next(asked)
            assert batch["question_ids"][row] == question["question_id"]
            assert batch["image_ids"][row] == question["image_id"]
            text = tokenizer.decode(inputs["input_ids"][row], skip_special_tokens=True)
            expected = tokenizer(f"Question: {question['question']} Short answer:").input_ids
            assert text == tokenizer.decode(expected, skip_special_tokens=True)
            assert batch["answers"][row] == [batch["answers"][row][0]] * 10
            file = np.asarray(Image.open(f"{split.images}/{question['image_id']:012d}.png"))
            pixels = ((inputs["pixel_values"][row] + 1) * 127.5).permute(1, 2, 0).numpy()
            np.testing.assert_allclose(pixels, file, atol=1e-3)


def test_types_of_questions_and_answers_are_those_of_the_annotations(tmp_path, processor):
    split = scenes(tmp_path, 10)
    expected = json.loads(Path(split.annotations).read_text())["annotations"]
    batches = list(VQADataModule(processor, val=split, batch_size=4).val_dataloader())
    for field, name in (("question_types", "question_type"), ("answer_types", "answer_type")):
        assert [text for batch in batches for text in batch[field]] == [record[name] for record in expected]
    edit("annotations", lambda records: records[7].update(question_type=None))(tmp_path)  # nothing else reads it
    edit("annotations", lambda records: records[3].pop("answer_type"))(tmp_path)
    batch = next(iter(VQADataModule(processor, val=split).val_dataloader()))
    assert len(batch["answers"]) == 10 and not {"question_types", "answer_types"} & batch.keys()


def test_text_is_padded_on_the_left(tmp_path, processor):
    batch = next(iter(VQADataModule(processor, val=scenes(tmp_path, 8)).val_dataloader()))
    text_mask = batch["inputs"]["attention_mask"][:, QUERIES:]
    assert text_mask[:, -1].all()
    assert (text_mask.diff(dim=1) >= 0).all()
    assert (text_mask == 0).any()


def test_fraction_keeps_a_seeded_share_in_file_order(tmp_path):
    split = scenes(tmp_path, 40)
    order = [question["question_id"] for question in questions_of(split)]
    chosen = [question.question_id for question in VQADataset(split, 0.25).questions]
    assert len(chosen) == 10
    assert chosen == [number for number in order if number in chosen]
    assert chosen == [question.question_id for question in VQADataset(split, 0.25).questions]
    assert chosen != [question.question_id for question in VQADataset(split, 0.25, seed=1).questions]
    assert len(VQADataset(split, 0.001)) == 1
    assert [question.question_id for question in VQADataset(split).questions] == order


def test_the_calibration_split_may_have_a_share_of_its_own(tmp_path, processor):
    split = scenes(tmp_path, 40)
    shares = {}
    for share in (None, 0.5):
        data = VQADataModule(processor, calibration=split, val=split, fraction=0.25, calibration_fraction=share)
        loaders = (data.calibration_dataloader(), data.val_dataloader())
        shares[share] = [len(loader.dataset) for loader in loaders]
    assert shares == {None: [10, 10], 0.5: [20, 10]}
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 2"):
        VQADataModule("unused", calibration_fraction=2)


def test_answers_stay_with_their_question_when_a_share_is_kept(tmp_path):
    split = scenes(tmp_path, 40)
    annotations = json.loads(Path(split.annotations).read_text())["annotations"]
    truth = {record["question_id"]: [answer["answer"] for answer in record["answers"]] for record in annotations}
    dataset = VQADataset(split, 0.25)
    assert len(dataset) == 10
    for example in (dataset[index] for index in range(10)):
        assert example["answers"] == truth[example["question_id"]]


def test_prediction_falls_back_to_test_then_val(tmp_path, processor):
    one, two, three = (scenes(tmp_path / str(count), count) for count in (1, 2, 3))
    assert len(ids(VQADataModule(processor, val=one, test=two, predict=three).predict_dataloader())) == 3
    assert len(ids(VQADataModule(processor, val=one, test=two).predict_dataloader())) == 2
    assert len(ids(VQADataModule(processor, val=one).predict_dataloader())) == 1


def test_workers_give_the_same_batches(tmp_path, processor):
    split = scenes(tmp_path, 6)
    alone, workers = (
        list(VQADataModule(processor, calibration=split, batch_size=4, num_workers=number).calibration_dataloader())
        for number in (0, 2)
    )
    assert len(alone) == len(workers) == 2
    for one, other in zip(alone, workers, strict=True):
        torch.testing.assert_close(one["inputs"], other["inputs"], atol=0, rtol=0)
        assert one["answers"] == other["answers"]
        assert one["question_ids"].equal(other["question_ids"])


def test_lightning_moves_every_tensor_and_leaves_answers(tmp_path, processor):
    data = VQADataModule(processor, val=scenes(tmp_path, 2))
    batch = next(iter(data.val_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    tensors = [*moved["inputs"].values(), moved["question_ids"], moved["image_ids"]]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 5
    assert moved["answers"] == batch["answers"]


def test_split_without_annotations_has_no_answers(tmp_path, processor):
    data = VQADataModule(processor, predict=scenes(tmp_path, 2, annotated=False))
    assert "answers" not in next(iter(data.predict_dataloader()))


def test_images_of_other_modes_become_rgb(tmp_path):
    split = scenes(tmp_path, 2)
    file = next(Path(split.images).iterdir())
    Image.new("LA", (5, 7), (9, 128)).save(file)
    image = VQADataset(split)[0]["image"]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 7), (9, 9, 9))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"fraction must be in \(0, 1\], got {fraction}"):
        VQADataModule("unused", fraction=fraction)


@pytest.mark.parametrize("prompt", ["Question:", "{question}", "{} or {}"])
def test_prompt_without_one_place_for_the_question_is_refused(prompt):
    with pytest.raises(DataError, match=r"must hold '\{\}' once"):
        VQADataModule("unused", prompt=prompt)


NAMES = ["image.png", "{}.png", "{image}.png", "{image_id:q}.png", "{image_id", "{image_id}{0}", "{image_id.x}.png"]
NAMES += ["{image_id[0]}.png", "{image_id.__class__}", "{image_id:0{image_id}d}.png", "{image_id:0999999999d}.png"]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_name_without_the_id_or_with_a_field_that_costs_or_tells_more_is_refused(name):
    with pytest.raises(DataError, match="Use the field image_id"):
        VQASplit("questions.json", "images", image_name=name)


def test_braces_in_prompt_and_question_are_plain_text(tmp_path, processor):
    split = scenes(tmp_path, 1)
    edit("questions", lambda q: q[0].update(question="{yes}"))(tmp_path)
    batch = next(iter(VQADataModule(processor, val=split, prompt="{no} {} 3").val_dataloader()))
    assert build_processor().tokenizer.decode(batch["inputs"]["input_ids"][0, QUERIES + 1 :]) == (
        "<unk> no <unk> <unk> yes <unk> 3"
    )


def test_loader_of_a_split_that_was_not_given_says_so(processor):
    with pytest.raises(DataError, match=r"no calibration split: give VQADataModule\(calibration=VQASplit"):
        VQADataModule(processor).calibration_dataloader()


def test_tokenizer_alone_is_refused_as_processor(tmp_path):
    build_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = VQADataModule(str(tmp_path / "tokenizer"), val=scenes(tmp_path, 1))
    with pytest.raises(DataError, match="does not take text and images"):
        data.val_dataloader()


def test_every_argument_can_come_from_yaml(tmp_path):
    folder = save_model(tmp_path / "model", opt_config())
    split = scenes(tmp_path / "scenes", 4)
    (tmp_path / "config.yaml").write_text(
        f"data: {{processor: {folder}, fraction: 0.5, val: {{questions: {split.questions}, images: {split.images}, "
        f"image_name: '{split.image_name}'}}}}\nmodule: {{model: {folder}, generation: {{max_new_tokens: 3}}}}\n"
    )
    parser = ArgumentParser()
    parser.add_class_arguments(VQADataModule, "data")
    parser.add_class_arguments(VQAModule, "module")
    made = parser.instantiate_classes(parser.parse_path(str(tmp_path / "config.yaml")))
    assert len(ids(made.data.val_dataloader())) == 2
    assert made.module.generation == {"max_new_tokens": 3, "do_sample": False}
