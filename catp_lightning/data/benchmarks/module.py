"""Evaluation data sets in their official files, as a LightningDataModule."""

from typing import Any, ClassVar

from torch.utils.data import Dataset

from catp_lightning.data.benchmarks.dataset import BenchmarkDataset
from catp_lightning.data.benchmarks.reader import Reader
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.data.vqa_dataset import VQAExample


class BenchmarkDataModule(VQADataModule):
    """Splits of evaluation data sets as loaders of `VQABatch`, a reader for each; nothing is ever shuffled.

    `VQAModule` scores them by the metric of the data set. Splits can be of several data sets: a policy can be
    calibrated on questions of GQA, and tested on POPE.

    Args:
        processor: folder or name for `AutoProcessor.from_pretrained`; text is padded on the left.
        calibration: reader of the split that `calibration_dataloader` reads. Its images should be in no other split.
        val: reader of the split for validation.
        test: reader of the split for testing.
        predict: reader of the split for prediction; where None, test is taken, and where that is None too, val.
        prompt: text around a question, with `{}` where the question goes, and the image token for models that want it.
            For videos it has the video token, or `{frames:...}`, which repeats what follows the colon for each frame.
        batch_size: questions a batch.
        num_workers: processes that read images; 0 reads in the main process.
        fraction: share of every split's questions to keep, in (0, 1]; those that are judged together stay together.
        seed: seed of the choice of questions.
        calibration_fraction: the share of the calibration split's, in (0, 1]; None: `fraction`.

    Raises:
        DataError: `prompt` has no `{}`, a split that is asked for was not given, or as `BenchmarkDataset`.
        ValueError: a fraction is outside (0, 1].

    Example::

        pope = POPE("pope/coco_pope_random.json", "coco/val2014")
        trainer.test(VQAModule("path/of/a/model"), BenchmarkDataModule("path/of/a/model", test=pope))
    """

    example: ClassVar[str] = "POPE(...)"

    def __init__(
        self,
        processor: str,
        calibration: Reader | None = None,
        val: Reader | None = None,
        test: Reader | None = None,
        predict: Reader | None = None,
        prompt: str = "Question: {} Short answer:",
        batch_size: int = 32,
        num_workers: int = 0,
        fraction: float = 1.0,
        seed: int = 42,
        calibration_fraction: float | None = None,
    ) -> None:
        readers: dict[str, Any] = {"calibration": calibration, "val": val, "test": test, "predict": predict}
        more: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "fraction": fraction,
            "seed": seed,
            "calibration_fraction": calibration_fraction,
        }
        super().__init__(processor, prompt=prompt, **readers, **more)  # `read` takes readers in the place of files

    def read(self, split: Reader, fraction: float) -> Dataset[VQAExample]:
        """Return a share of the questions that a reader reads, with their images."""
        return BenchmarkDataset(split, fraction, self.seed)
