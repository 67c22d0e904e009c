"""A ready LightningModule that answers questions about images with a Hugging Face vision-language model."""

from typing import Any, TypedDict, cast

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import ModuleDict
from torchmetrics import Metric
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from catp_lightning.data.vqa import VQABatch
from catp_lightning.errors import DataError
from catp_lightning.metrics import VQAAccuracy
from catp_lightning.metrics.benchmarks import BENCHMARKS


class VQAAnswer(TypedDict):
    """Answer to a question, in VQAv2's result layout."""

    question_id: int
    answer: str


class VQAModule(LightningModule):
    """Validates, tests and predicts with a vision-language model on batches of `VQADataModule`; it cannot be trained.

    Validation and test log `val/vqa_accuracy` and `test/vqa_accuracy`, in [0, 1]. On batches of `BenchmarkDataModule`
    they log the figures of the data set's metric, `test/pope_f1` and its like. Prediction returns a list of `VQAAnswer`
    for each batch.

    Args:
        model: folder or name for `AutoModelForImageTextToText.from_pretrained`, or a model; put in evaluation mode.
        processor: folder or name for `AutoProcessor.from_pretrained`; None: the same as `model`.
        generation: arguments of the model's `generate`, beside or in place of `max_new_tokens=10, do_sample=False`.

    Raises:
        ValueError: a model was given without `processor`.

    Example::

        module = VQAModule("Salesforce/blip2-opt-2.7b", generation={"num_beams": 5, "length_penalty": -1.0})
        trainer.validate(module, VQADataModule("Salesforce/blip2-opt-2.7b", val=split))
    """

    model: Any  # a PreTrainedModel: the signature of its generate is checked by transformers when it runs

    def __init__(
        self,
        model: str | PreTrainedModel,
        processor: str | None = None,
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            self.save_hyperparameters()
            self.model = AutoModelForImageTextToText.from_pretrained(model)
        elif processor is None:
            raise ValueError(
                f"processor is needed beside a model that is given as an object ({type(model).__name__}): "
                "name the folder or repository it was loaded from."
            )
        else:
            self.model = model
        self.model.eval()
        self.processor = AutoProcessor.from_pretrained(processor or model)
        self.generation = {"max_new_tokens": 10, "do_sample": False, **(generation or {})}
        self.val_accuracy = VQAAccuracy()
        self.test_accuracy = VQAAccuracy()
        self.benchmarks = ModuleDict()  # metrics of evaluation data sets, by stage and name

    def forward(self, **inputs: Any) -> Any:
        """Call the model with `inputs` and return its output."""
        return self.model(**inputs)

    def answer(self, batch: VQABatch) -> list[str]:
        """Generate the answer to each question of a batch, without the prompt and without spaces around it.

        Raises:
            DataError: a prompt is longer than the model has positions, or has another number of image tokens than the
                model has query tokens.
        """
        self._check_length(batch)
        self._check_image_tokens(batch)
        dtype = self.model.dtype
        # A model loaded in half precision gets float32 pixels from the processor where the Trainer converts nothing.
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in batch["inputs"].items()
        }
        output: Tensor = self.model.generate(**inputs, **self.generation)
        if not self.model.config.is_encoder_decoder:  # the output of a decoder-only model starts with the prompt
            output = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(output, skip_special_tokens=True)]

    def _check_length(self, batch: VQABatch) -> None:
        max_positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not isinstance(max_positions, int) or self.model.config.is_encoder_decoder:
            return
        lengths = batch["inputs"]["attention_mask"].sum(1)
        if int(lengths.max()) > max_positions:
            raise DataError(
                f"The prompt of question {int(batch['question_ids'][lengths.argmax()])} has {int(lengths.max()):,} "
                f"tokens, visual ones included; the model has {max_positions:,} positions. Shorten the question, or "
                "leave it out of the questions file."
            )

    def _check_image_tokens(self, batch: VQABatch) -> None:
        """Raise DataError if a prompt has another number of image tokens than the model has query tokens.

        A model with query tokens puts them in the place of the image tokens, and answers without the image if there are
        none.
        """
        each, token = (getattr(self.model.config, name, None) for name in ("num_query_tokens", "image_token_id"))
        if each is None or token is None:
            return
        counts = (batch["inputs"]["input_ids"] == token).sum(1)
        if bool((counts != each).any()):
            row = int((counts != each).long().argmax())
            raise DataError(
                f"The prompt of question {int(batch['question_ids'][row])} has {int(counts[row])} image tokens (id "
                f"{token}) where this {type(self.model).__name__} puts {each} query tokens of the image: it would "
                f"answer without them. Set processor.num_query_tokens = {each} (processors saved before transformers "
                "4.46 have none), save the processor, and name that one."
            )

    def validation_step(self, batch: VQABatch, batch_idx: int) -> None:
        self._score("val", self.val_accuracy, batch)

    def test_step(self, batch: VQABatch, batch_idx: int) -> None:
        self._score("test", self.test_accuracy, batch)

    def on_validation_epoch_end(self) -> None:
        self._log_benchmarks("val")

    def on_test_epoch_end(self) -> None:
        self._log_benchmarks("test")

    def predict_step(self, batch: VQABatch, batch_idx: int) -> list[VQAAnswer]:
        ids = batch["question_ids"].tolist()
        return [
            VQAAnswer(question_id=question_id, answer=answer)
            for question_id, answer in zip(ids, self.answer(batch), strict=True)
        ]

    def _score(self, stage: str, accuracy: VQAAccuracy, batch: VQABatch) -> None:
        if "metric" in batch and "references" in batch:
            self._benchmark(stage, batch["metric"]).update(self.answer(batch), batch["references"])
        elif "answers" in batch:
            accuracy.update(self.answer(batch), batch["answers"])
            self.log(f"{stage}/vqa_accuracy", accuracy, on_step=False, on_epoch=True, batch_size=len(batch["answers"]))
        else:
            wanted = "a file with answers" if "metric" in batch else "its VQASplit the annotations file"
            raise DataError(
                f"The {stage} split has no answers, so accuracy cannot be measured: give {wanted}, or run "
                "trainer.predict."
            )

    def _benchmark(self, stage: str, name: str) -> Metric:
        key = f"{stage}/{name}"
        if key not in self.benchmarks:
            self.benchmarks[key] = BENCHMARKS[name]().to(self.device)
        return cast(Metric, self.benchmarks[key])

    def _log_benchmarks(self, stage: str) -> None:
        """Log the figures of metrics that were updated in this epoch; every process has batches, and takes part."""
        for key, module in self.benchmarks.items():
            metric = cast(Metric, module)
            if key.startswith(f"{stage}/") and metric.update_called:
                self.log_dict({f"{key}_{name}": value for name, value in metric.compute().items()}, sync_dist=True)
                metric.reset()
