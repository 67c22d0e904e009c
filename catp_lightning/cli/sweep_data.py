"""What a sweep reads of its datamodule."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from catp_lightning.data.vqa import VQADataModule

Loader = Callable[[], Any]


def loaders(datamodule: Any) -> tuple[Loader, Loader | None]:
    """Return a function that makes the loader of the compared questions, and one for the calibration split, or None.

    The compared questions are the test split's, or where there is none the validation split's. None: the datamodule has
    no calibration split.

    Raises:
        ArgumentError: there is no datamodule.
    """
    if datamodule is None:
        raise ArgumentError(None, "A sweep needs data: give --data, or a configuration that names it.")
    datamodule.prepare_data()
    splits: Mapping[str, Any] = datamodule.splits if isinstance(datamodule, VQADataModule) else {}
    has_test = is_overridden("test_dataloader", datamodule, LightningDataModule)
    test = splits["test"] is not None if splits else has_test
    calibration = hasattr(datamodule, "calibration_dataloader") and splits.get("calibration", True) is not None

    def compared() -> Any:
        datamodule.setup("test" if test else "validate")
        return datamodule.test_dataloader() if test else datamodule.val_dataloader()

    def calibrated() -> Any:
        datamodule.setup("calibration")
        return datamodule.calibration_dataloader()

    return compared, calibrated if calibration else None


@contextmanager
def reads(datamodule: Any, loader: Any) -> Iterator[None]:
    """Context in which prediction reads `loader`; the datamodule's hooks on batches run as usual."""
    changed = {"predict_dataloader": lambda: loader, "setup": lambda stage: None, "prepare_data": lambda: None}
    before = {name: vars(datamodule)[name] for name in changed if name in vars(datamodule)}
    try:
        vars(datamodule).update(changed)
        yield
    finally:
        for name in changed:
            del vars(datamodule)[name]
        vars(datamodule).update(before)
