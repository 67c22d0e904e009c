"""Questions about images in the official VQAv2 layout, as a LightningDataModule."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, NotRequired, TypedDict

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor

from catp_lightning.data.marks import image_token_id, marks_in
from catp_lightning.data.visual_inputs import described, visual_inputs
from catp_lightning.data.vqa_dataset import VQADataset, VQAExample, VQASplit, check_fraction
from catp_lightning.errors import DataError

SETTINGS = {
    "num_query_tokens": "config.num_query_tokens",
    "num_image_tokens": "config.vision_config: (image_size / patch_size) squared",
    "patch_size": "config.vision_config.patch_size",
    "vision_feature_select_strategy": "config.vision_feature_select_strategy",
}
"""Processor attributes that say how many tokens an image takes, and where the model's config has each of them."""


class VQABatch(TypedDict):
    """A batch of B questions, on one device.

    `inputs` holds what the processor returns for the model: `pixel_values` or `pixel_values_videos`, and `input_ids`
    and `attention_mask` int64 [B, T], left padded to T columns. `question_ids` and `image_ids`, of images or videos,
    are int64 [B]; `answers`, ten a question, are absent where the split has no annotations. `question_types` ("how
    many") and `answer_types` ("number"), one text a question, are absent where not every annotation has one. Batches of
    `BenchmarkDataModule` have `metric`, the name of the data set's metric, and `references`, what it compares each
    answer with, in the place of `answers`.
    """

    inputs: dict[str, Tensor]
    question_ids: Tensor
    image_ids: Tensor
    answers: NotRequired[list[list[str]]]
    question_types: NotRequired[list[str]]
    answer_types: NotRequired[list[str]]
    metric: NotRequired[str]
    references: NotRequired[list[Any]]


def collate(examples: Sequence[VQAExample], processor: Any, prompt: str) -> VQABatch:
    """Collate examples into a batch; `prompt` holds `{}` where the question goes, and is completed by `visual_inputs`.

    Raises:
        DataError: a question holds text that the tokenizer does not read as text; the processor cannot take an image or
            a question, or lacks a setting; the prompt lacks the image token that this model wants, or a place for
            frames.
    """
    marks = marks_in([example["question"] for example in examples], prompt, processor)
    for example, found in zip(examples, marks, strict=True):
        if found is not None:
            raise DataError(
                f"Question {example['question_id']}, {example['question']!r:.200}, holds {found!r}, which is read "
                "as a special token (an image, the end of a text, padding), not as text: the model would be asked "
                "something else. Reword it, or leave it out of the questions file."
            )
    try:
        inputs = _processed(examples, processor, prompt)
    except DataError:
        raise
    except Exception as error:  # every processor has its own types
        raise DataError(_incomplete(processor) or _refused(examples, processor, prompt, error)) from error
    token = image_token_id(processor)
    if "pixel_values_videos" not in inputs and token is not None and bool((inputs["input_ids"] != token).all(1).any()):
        raise DataError(
            _incomplete(processor)
            or f"prompt={prompt!r} has no image token: this model reads images where {processor.image_token!s} stands. "
            f"Put it in, as in '{processor.image_token!s} {prompt}'."
        )
    batch = VQABatch(
        inputs=dict(inputs),
        question_ids=torch.tensor([example["question_id"] for example in examples], dtype=torch.int64, device="cpu"),
        image_ids=torch.tensor([example["image_id"] for example in examples], dtype=torch.int64, device="cpu"),
    )
    if "answers" in examples[0]:
        batch["answers"] = [example["answers"] for example in examples]
    if "question_type" in examples[0]:
        batch["question_types"] = [example["question_type"] for example in examples]
    if "answer_type" in examples[0]:
        batch["answer_types"] = [example["answer_type"] for example in examples]
    if "metric" in examples[0]:
        batch["metric"] = examples[0]["metric"]
    if "reference" in examples[0]:
        batch["references"] = [example["reference"] for example in examples]
    return batch


def _processed(examples: Sequence[VQAExample], processor: Any, prompt: str) -> Any:
    return processor(**visual_inputs(examples, processor, prompt), padding=True, return_tensors="pt")


def _incomplete(processor: Any) -> str | None:
    """Return an error message on the `SETTINGS` that a processor lacks to place images in a text; None: none lack."""
    lacking = [name for name in SETTINGS if getattr(processor, name, 0) is None]
    if not lacking:
        return None
    names = " and ".join(lacking)
    return (
        f"This {type(processor).__name__} has no {names}, so it does not know how many tokens an image takes in a "
        "text, and the model would not read the image. Processors saved by older transformers lack it. Take it from "
        f"the model's config ({', '.join(SETTINGS[name] for name in lacking)}), set it (processor.{lacking[0]} = ...), "
        "save the processor (save_pretrained), and name that folder."
    )


def _refused(examples: Sequence[VQAExample], processor: Any, prompt: str, error: Exception) -> str:
    """Return an error message that names the first question of a batch that a processor cannot take."""
    for example in examples:
        try:
            _processed([example], processor, prompt)
        except Exception as own:
            return (
                f"{type(processor).__name__} cannot take question {example['question_id']}, "
                f"{example['question']!r:.200}, and {described(example)}, in prompt={prompt!r:.200}: "
                f"{type(own).__name__}: {own!s:.500}. Repair prompt, question or image."
            )
    numbers = ", ".join(str(example["question_id"]) for example in examples)
    return f"{type(processor).__name__} takes questions {numbers} singly, but not together: {error!s:.500}."


class VQADataModule(LightningDataModule):
    """Splits of a VQAv2-format data set as loaders of `VQABatch`; nothing is ever shuffled.

    Args:
        processor: folder or name for `AutoProcessor.from_pretrained`; text is padded on the left.
        calibration: the split that `calibration_dataloader` reads. Its images should be in no other split.
        val: the split for validation.
        test: the split for testing.
        predict: the split for prediction; where None, test is taken, and where that is None too, val.
        prompt: text around a question, with `{}` where the question goes, and the image token for models that want it.
        batch_size: questions a batch.
        num_workers: processes that read images; 0 reads in the main process.
        fraction: share of every split's questions to keep, in (0, 1]; 0.1 with seed 42 is CATP's protocol on VQAv2 val.
        seed: seed of the choice of questions.
        calibration_fraction: the share of the calibration split's, in (0, 1]; None: `fraction`.

    Raises:
        DataError: `prompt` has no `{}`, a split that is asked for was not given, or as `VQADataset`.
        ValueError: a fraction is outside (0, 1].

    Example::

        split = VQASplit("scenes/questions.json", "scenes/images", "scenes/annotations.json", "{image_id:012d}.png")
        data = VQADataModule("path/of/a/model", val=split)
        trainer.validate(VQAModule("path/of/a/model"), data)
    """

    example: ClassVar[str] = "VQASplit(...)"
    """How a split is given, for messages."""

    def __init__(
        self,
        processor: str,
        calibration: VQASplit | None = None,
        val: VQASplit | None = None,
        test: VQASplit | None = None,
        predict: VQASplit | None = None,
        prompt: str = "Question: {} Short answer:",
        batch_size: int = 32,
        num_workers: int = 0,
        fraction: float = 1.0,
        seed: int = 42,
        calibration_fraction: float | None = None,
    ) -> None:
        super().__init__()
        if prompt.count("{}") != 1:
            raise DataError(f"prompt={prompt!r} must hold '{{}}' once, where the question goes.")
        for share in (fraction, fraction if calibration_fraction is None else calibration_fraction):
            check_fraction(share)
        self.processor = processor
        self.splits: dict[str, Any] = {"calibration": calibration, "val": val, "test": test}
        self.splits["predict"] = predict or test or val
        self.prompt, self.batch_size, self.num_workers = prompt, batch_size, num_workers
        self.fraction, self.seed = fraction, seed
        self.calibration_fraction = fraction if calibration_fraction is None else calibration_fraction
        self._datasets: dict[str, Dataset[VQAExample]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the stage's files at once, so that errors in them are raised before anything runs."""
        name = {"fit": "val", "validate": "val"}.get(stage or "", stage)
        for candidate in self.splits if name is None else [name]:
            if self.splits.get(candidate) is not None:
                self._dataset(candidate)

    def calibration_dataloader(self) -> DataLoader[VQAExample]:
        """Return the loader of the calibration split, for `trainer.predict(module, data.calibration_dataloader())`."""
        return self._loader("calibration")

    def val_dataloader(self) -> DataLoader[VQAExample]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[VQAExample]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[VQAExample]:
        """Return the loader of the predict split; where that is not given of the test split, then of the val split."""
        return self._loader("predict")

    @cached_property
    def _processor(self) -> Any:
        processor = AutoProcessor.from_pretrained(self.processor)
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise DataError(
                f"processor={self.processor!r} holds a {type(processor).__name__}, which does not take text and "
                "images. Name the processor of a vision-language model."
            )
        processor.tokenizer.padding_side = "left"  # answers are generated after the last column
        return processor

    def read(self, split: Any, fraction: float) -> Dataset[VQAExample]:
        """Return a share of the questions of a split with their images."""
        return VQADataset(split, fraction, self.seed)

    def _dataset(self, name: str) -> Dataset[VQAExample]:
        if name not in self._datasets:
            split = self.splits[name]
            if split is None:
                raise DataError(f"There is no {name} split: give {type(self).__name__}({name}={self.example}).")
            fraction = self.calibration_fraction if name == "calibration" else self.fraction
            self._datasets[name] = self.read(split, fraction)
        return self._datasets[name]

    def _loader(self, name: str) -> DataLoader[VQAExample]:
        return DataLoader(
            self._dataset(name),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=partial(collate, processor=self._processor, prompt=self.prompt),
        )
