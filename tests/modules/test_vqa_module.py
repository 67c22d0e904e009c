"""VQAModule answers every question as its model alone would, and logs accuracy over questions."""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from catp_lightning.data.vqa import VQADataModule, VQASplit, collate
from catp_lightning.errors import DataError
from catp_lightning.modules.vqa import VQAModule
from tests.support.tiny_vqa import QUERIES, build_processor, opt_config, save_model, scenes, t5_config
from tests.support.trainers import trainer

PROMPT = "Question: {} Short answer:"
SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), opt_config())


def one_by_one(module: VQAModule, data: VQADataModule) -> list[str]:
    """Every question alone, hence without padding, by the model's own generate."""
    processor, answers = build_processor(), []
    for example in data.val_dataloader().dataset:
        inputs = collate([example], processor, PROMPT)["inputs"]
        output = module.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers.append(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def answer_half_as(split: VQASplit, answers: list[str]) -> None:
    """Annotations that agree with every other answer."""
    path = Path(split.annotations)
    content = json.loads(path.read_text())
    for index, (record, answer) in enumerate(zip(content["annotations"], answers, strict=True)):
        for given in record["answers"]:
            given["answer"] = answer if index % 2 else "nothing of the kind"
    path.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_predictions_are_the_models_own_answers(tmp_path, folder, workers):
    module = VQAModule(folder, generation=SHORT)
    data = VQADataModule(folder, val=scenes(tmp_path, 11), batch_size=4, num_workers=workers)
    batches = trainer().predict(module, data)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    expected = one_by_one(module, data)
    assert len(set(expected)) > 3
    ids = [question.question_id for question in data.val_dataloader().dataset.questions]
    assert list(chain(*batches)) == [
        {"question_id": number, "answer": answer} for number, answer in zip(ids, expected, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_accuracy_is_logged_over_questions_not_batches(tmp_path, folder, stage):
    module, split = VQAModule(folder, generation=SHORT), scenes(tmp_path, 10)
    data = VQADataModule(folder, val=split, test=split, batch_size=7)  # the second batch has three
    answer_half_as(split, one_by_one(module, data))
    data = VQADataModule(folder, val=split, test=split, batch_size=7)
    name = {"validate": "val", "test": "test"}[stage]
    for inference_mode in (True, False):  # the second run starts from nothing
        (logged,) = getattr(trainer(inference_mode=inference_mode), stage)(module, data, verbose=False)
        assert logged == {f"{name}/vqa_accuracy": 0.5}


def test_validation_without_answers_says_what_to_do(tmp_path, folder):
    data = VQADataModule(folder, val=scenes(tmp_path, 2, annotated=False))
    with pytest.raises(DataError, match=r"val split has no answers.*annotations file, or run trainer\.predict"):
        trainer().validate(VQAModule(folder), data, verbose=False)


def test_model_object_needs_its_processor_named(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    with pytest.raises(ValueError, match=r"processor is needed .*Blip2ForConditionalGeneration"):
        VQAModule(model)
    module = VQAModule(model, processor=folder)
    assert module.model is model
    assert not model.training
    assert not module.hparams


def test_checkpoint_brings_model_and_settings_back(tmp_path, folder):
    module = VQAModule(folder, generation=SHORT)
    torch.nn.init.normal_(module.model.language_projection.weight)  # not what the folder holds
    data = VQADataModule(folder, val=scenes(tmp_path, 6))
    run = trainer()
    before = run.predict(module, data)
    run.save_checkpoint(tmp_path / "module.ckpt")
    loaded = VQAModule.load_from_checkpoint(tmp_path / "module.ckpt")
    assert loaded.generation == {"max_new_tokens": 4, "do_sample": False}
    assert trainer().predict(loaded, data) == before
    assert trainer().predict(VQAModule(folder, generation=SHORT), data) != before


@pytest.mark.parametrize(
    ("loaded", "precision", "runs_in"),
    [
        (torch.float32, "bf16-true", torch.bfloat16),
        (torch.bfloat16, "32-true", torch.bfloat16),
        (torch.float32, "bf16-mixed", torch.float32),
    ],
)
def test_half_precision_answers_every_question(tmp_path, folder, loaded, precision, runs_in):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=loaded)
    module = VQAModule(model, processor=folder, generation=SHORT)
    data = VQADataModule(folder, val=scenes(tmp_path, 8), batch_size=3)
    answers = list(chain(*trainer(precision=precision).predict(module, data)))
    assert len(answers) == 8
    assert len({answer["answer"] for answer in answers}) > 2
    assert next(model.vision_model.parameters()).dtype == runs_in


def test_pixels_reach_the_model_in_its_own_dtype(tmp_path, folder):
    module = VQAModule(folder, generation=SHORT).bfloat16()
    batch = next(iter(VQADataModule(folder, val=scenes(tmp_path, 2)).val_dataloader()))
    seen = []
    module.model.vision_model.embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert len(module.answer(batch)) == 2
    assert seen == [torch.bfloat16]
    assert batch["inputs"]["pixel_values"].dtype == torch.float32


def test_encoder_decoder_answers_are_not_cut(tmp_path):
    folder = save_model(tmp_path / "t5", t5_config())
    module = VQAModule(folder, generation=SHORT)
    data = VQADataModule(folder, val=scenes(tmp_path / "scenes", 4))
    batch = next(iter(data.val_dataloader()))
    output = module.model.generate(**batch["inputs"], max_new_tokens=4, do_sample=False)
    answers = module.answer(batch)
    assert answers == build_processor().batch_decode(output, skip_special_tokens=True)
    assert all(answers)


def test_generation_settings_reach_the_model(tmp_path, folder):
    batch = next(iter(VQADataModule(folder, val=scenes(tmp_path, 4)).val_dataloader()))
    lengths = [
        {len(answer.split()) for answer in VQAModule(folder, generation=generation).answer(batch)}
        for generation in ({"max_new_tokens": 2, "min_new_tokens": 2}, None)
    ]
    assert lengths[0] == {2}
    assert max(lengths[1]) == 10


def test_forward_is_the_models_own(tmp_path, folder):
    module = VQAModule(folder)
    inputs = next(iter(VQADataModule(folder, val=scenes(tmp_path, 2)).val_dataloader()))["inputs"]
    torch.testing.assert_close(module(**inputs).logits, module.model(**inputs).logits, atol=0, rtol=0)


def test_prompts_without_their_images_tokens_are_refused_by_question(tmp_path, folder):
    module = VQAModule(folder, generation=SHORT)
    batch = next(iter(VQADataModule(folder, val=scenes(tmp_path, 4)).val_dataloader()))
    module.answer(batch)
    ids = batch["inputs"]["input_ids"]
    for row, column in ((slice(None), slice(QUERIES)), (2, slice(QUERIES)), (2, 0)):
        changed = ids.clone()
        changed[row, column] = 7
        blind = {**batch, "inputs": {**batch["inputs"], "input_ids": changed}}
        first = int(batch["question_ids"][row if row == 2 else 0])
        with pytest.raises(DataError, match=rf"question {first} has [03] image tokens .*num_query_tokens = {QUERIES}"):
            module.answer(blind)
