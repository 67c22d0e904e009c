"""TokenPruning(log_images=...): pictures of a loop's first samples, in the files of real loggers."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from catp_lightning import TokenPruning, plots
from tests.support.models import random_blip2
from tests.support.modules import Answering, by_hand, same
from tests.support.policies import HALF
from tests.support.run_files import complete, history_of
from tests.support.trainers import loading, trainer

NAME = "catp/kept_tokens"


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


@pytest.mark.slow
def test_the_first_samples_are_in_the_files_of_a_wandb_run_and_a_logger_without_pictures_is_skipped(
    tmp_path: Path,
) -> None:
    import wandb

    module, callback = Answering(), TokenPruning(HALF, log_images=3)
    loggers = [WandbLogger(project="catp", save_dir=str(tmp_path), offline=True), CSVLogger(tmp_path / "csv")]
    run = trainer(callback, logger=loggers)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert same(run.predict(module, module.loader()), by_hand(module)), "it prunes as it does without"
    wandb.finish()
    assert not [one for one in told if "could not be logged" in str(one.message)]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (logged,) = [step[NAME] for step in history_of(complete(file)) if NAME in step]
    samples = len(module.inputs["input_ids"]) + 1
    assert logged["count"] == len(callback.shown) == min(3, samples)
    for name, shown in zip(logged["filenames"], callback.shown, strict=True):
        saved = pixels((file.parent / "files" / name).read_bytes())
        assert np.array_equal(saved, pixels(plots.kept_tokens(shown).png()))
        assert int(shown.last.keep.sum()) * 2 == len(shown.last.keep)
    loggers[1].save()
    assert "catp/keep_share" in (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text()


def test_each_loop_has_its_own_first_samples_and_no_more_are_kept() -> None:
    model, inputs = random_blip2()
    module, callback = Answering((model, inputs)), TokenPruning(HALF, log_images=1)
    trainer(callback).validate(module, module.loader())
    (first,) = callback.shown
    trainer(callback).test(module, loading([list(module.loader())[1]]))
    (second,) = callback.shown
    assert second is not first and second.last.keep.equal(first.last.keep), "it is the same sample"
    callback = TokenPruning(HALF, log_images=100)
    trainer(callback).validate(module, module.loader())
    assert len(callback.shown) == len(inputs["input_ids"]) + 1
    without = TokenPruning(HALF)
    trainer(without).validate(module, module.loader())
    assert without.shown == []


def test_tensorboard_has_figures_and_a_picture_for_each_sample_after_each_validation(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module, callback = Answering(), TokenPruning(HALF, log_images=2)
    logger = TensorBoardLogger(tmp_path)
    settings: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 1, "limit_train_batches": 1}
    trainer(callback, logger=logger, **settings).fit(module, module.loader(1), module.loader())
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("catp/keep_share")] == [0.5, 0.5]
    assert events.Tags()["images"] == [f"{NAME}/0", f"{NAME}/1"]
    for number, shown in enumerate(callback.shown):
        logged = events.Images(f"{NAME}/{number}")
        assert [event.step for event in logged] == [1, 2]
        assert np.array_equal(pixels(logged[-1].encoded_image_string), pixels(plots.kept_tokens(shown).png()))


def test_a_number_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="log_images is -1"):
        TokenPruning(HALF, log_images=-1)
