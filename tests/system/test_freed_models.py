"""A model is freed with its last reference, and a record that is kept holds only choices."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import CrossAttentionCalibration, PrunedModule, TokenPruning, prune
from tests.support.calibrations import data
from tests.support.families import BY_NAME
from tests.support.modules import Answering, Generating
from tests.support.policies import HALF
from tests.support.remains import CASES, Case, uncollected
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("frozen", "undrawn")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_is_freed_with_its_last_reference(case: Case) -> None:
    """Whoever deletes a model of many gigabytes to load the next cannot wait for the collector of cycles."""
    model = replace(BY_NAME[case.row], name="freed").make().eval()
    inputs = case.inputs()
    with uncollected():
        with torch.no_grad(), prune(model, case.policy, guide=case.guide) as pruning:
            model(**inputs)
        kept, record, gone = pruning.keep, weakref.ref(pruning), weakref.ref(model)
        del pruning
        assert record() is None
        del model
        assert gone() is None and kept is not None


@pytest.mark.slow
def test_after_loops_wrapper_and_calibration_a_model_is_freed(tmp_path: Path) -> None:
    module = Answering()
    callback = TokenPruning(HALF)
    calibration = CrossAttentionCalibration(tmp_path / "p.json", keep=0.5, settings=QUICKEST)
    trainer(callback).validate(module, module.loader())
    trainer().predict(PrunedModule(module, HALF), module.loader())
    with pytest.raises(RuntimeError, match="planted"):
        trainer(callback).predict(Broken(), module.loader())
    batches = loading(data(24, 12))
    calibrated = Generating()
    trainer(calibration).predict(calibrated, batches)
    gone = [weakref.ref(module.model), weakref.ref(calibrated.net)]
    for each in (callback, calibration):  # where Lightning puts the module's own methods
        vars(each).pop("log", None), vars(each).pop("log_dict", None)
    del module, calibrated
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert calibration.policies and callback.figures, "the callbacks are still there"


class Broken(Answering):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.model(**batch)
        raise RuntimeError("planted")


def test_a_record_that_is_kept_holds_only_choices() -> None:
    """Not features, attention maps or autograd graphs of its calls, nor views of them, which hold all of them."""
    for case in CASES:
        model, inputs = case.model(), case.inputs()
        with prune(model, case.policy, guide=case.guide) as pruning:
            model(**inputs)  # with gradients
            if case.row != "Mllama":
                model.get_image_features(inputs["pixel_values"])  # what is seen of it nobody takes
        own = [value for part in (pruning, pruning.last) for value in vars(part).values() if isinstance(value, Tensor)]
        assert len(own) >= 5 and pruning.prefills == 1
        for tensor in own:
            assert not tensor.requires_grad and tensor.untyped_storage().nbytes() <= 8 * pruning.keep.numel(), case
