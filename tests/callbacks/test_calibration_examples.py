"""Examples in a calibration's report: what the saved policies keep of a few images, and what they answer."""

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catp_lightning import CrossAttentionCalibration, PolicyError, PruningPolicy, prune
from catp_lightning.calibration.split import part_of
from catp_lightning.callbacks import calibration, calibration_examples
from catp_lightning.callbacks.calibration_examples import BATCHES, wanted_samples
from catp_lightning.pages import Example
from tests.support.calibrations import data, images_of
from tests.support.footprints import footprint
from tests.support.models import faint_blip2, greedily
from tests.support.modules import Generating
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("one_pixel")


class Counting(Generating):
    """Counts its steps."""

    steps = 0

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Any:
        self.steps += 1
        return super().predict_step(batch, batch_idx)


def calibrated(path: Path, **settings: Any) -> tuple[Counting, CrossAttentionCalibration]:
    module = Counting(faint_blip2(0.2), greedily(2))
    callback = CrossAttentionCalibration(path, scorer="catp", settings=QUICKEST, **settings)
    trainer(callback).predict(module, loading(data(48, 8)))
    return module, callback


@pytest.fixture(scope="module")
def shown(
    tmp_path_factory: pytest.TempPathFactory, one_pixel: None
) -> tuple[list[Example], Counting, list[PruningPolicy], str]:
    """The examples of a calibration for two budgets, its module, its policies and its page."""
    folder, kept = tmp_path_factory.mktemp("examples"), list[Example]()
    with pytest.MonkeyPatch.context() as patch:
        whole = calibration.examples_of
        patch.setattr(calibration, "examples_of", lambda *given: kept.extend(whole(*given)) or kept)
        module, callback = calibrated(folder, keep=[7, 4], examples=3)
    steps, module.steps = module.steps, 0
    assert 6 < steps <= 6 + BATCHES * 2 * 2, "few batches are answered again, unpruned and pruned, at two budgets"
    return kept, module, callback.policies, (folder / "report/report.html").read_text()


def answers(module: Generating, policy: PruningPolicy | None, sample: dict[str, torch.Tensor]) -> str:
    if policy is None:
        ids = module.predict_step(sample)
    else:
        with prune(module, policy):
            ids = module.predict_step(sample)
    return f"token ids {' '.join(map(str, ids[0, -2:].tolist()))}"  # without the prompt


def test_examples_are_of_the_checking_part_with_the_answers_that_prune_gives(
    shown: tuple[list[Example], Counting, list[PruningPolicy], str],
) -> None:
    examples, module, policies, _ = shown
    (whole,) = data(48, 48)
    checked = part_of(images_of([whole]), QUICKEST.checked) == 1
    samples = [{name: value[row : row + 1] for name, value in whole.items()} for row in checked.nonzero()[:, 0]]
    with torch.no_grad():
        for policy in policies:
            own = [one for one in examples if one.at == f"keep {policy.keep}"]
            known = [(answers(module, None, sample), answers(module, policy, sample)) for sample in samples]
            for one in own:
                assert (one.unpruned, one.pruned) in known
                assert one.agrees == (one.unpruned == one.pruned)
            same = sum(full == pruned for full, pruned in known)
            assert [one.agrees for one in own] == [False] * min(3, len(known) - same) + [True] * min(3, same)
    assert {one.agrees for one in examples} == {True, False}, "or this proves nothing"


def test_their_pictures_are_small_and_all_of_them_are_in_the_page(
    shown: tuple[list[Example], Counting, list[PruningPolicy], str],
) -> None:
    examples, _, _, page = shown
    inlined = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert [base64.b64decode(one) for one in inlined] == [example.picture for example in examples]
    for example in examples:
        with Image.open(BytesIO(example.picture)) as image:
            assert image.format == "JPEG" and 100 < image.width <= 640 and image.height <= 400


def test_no_batch_is_answered_again_where_no_example_is_asked_for(tmp_path: Path) -> None:
    without, _ = calibrated(tmp_path, keep=[7, 4], examples=0)
    assert without.steps == 6, "what was recorded is in memory: one step for each batch"
    assert "#examples" not in (tmp_path / "report/report.html").read_text()


def test_where_examples_fail_the_report_is_written_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("the images are gone")

    monkeypatch.setattr(calibration_examples, "batches_again", fails)
    with pytest.warns(UserWarning, match=r"no examples, for they failed \(OSError: the images are gone\)"):
        calibrated(tmp_path / "p.json")
    assert PruningPolicy.load(tmp_path / "p.json").keep == 0.5
    assert "#examples" not in (tmp_path / "p-report/report.html").read_text()


def test_a_step_that_fails_under_a_policy_costs_the_examples_alone_and_leaves_the_model_as_it_was(
    tmp_path: Path,
) -> None:
    class Failing(Counting):
        def predict_step(self, batch: Any, batch_idx: int = 0) -> Any:
            if self.steps == 7:  # the loop's six, and one without pruning
                raise RuntimeError("planted")
            return super().predict_step(batch, batch_idx)

    module = Failing(faint_blip2(0.2), greedily(2))
    before = footprint(module)
    callback = CrossAttentionCalibration(tmp_path, scorer="catp", settings=QUICKEST)
    with pytest.warns(UserWarning, match=r"no examples, for they failed \(RuntimeError: planted\)"):
        trainer(callback).predict(module, loading(data(48, 8)))
    assert footprint(module) == before and (tmp_path / "report/report.html").is_file()


def test_samples_that_disagree_choose_the_batches_and_those_that_agree_lie_beside_them() -> None:
    batches = [torch.arange(10 * number, 10 * number + 10) for number in range(8)]
    keys, agreed = np.arange(80), np.ones(80, dtype=bool)
    agreed[[3, 31, 32, 33, 50, 60, 70]] = False
    found = wanted_samples(batches, keys, agreed, 4)
    assert found == {3: {31, 32, 33}, 0: {3, 0, 1, 2, 4}}, "the batch with most of them, then the first"
    assert len(wanted_samples(batches, keys, agreed, 40)) == BATCHES
    assert wanted_samples(batches, keys, np.ones(80, dtype=bool), 2) == {0: {0, 1}}
    assert wanted_samples(batches, keys[:0], agreed[:0], 2) == {}
    assert wanted_samples(batches[:3], keys, agreed, 4) == {0: {3, 0, 1, 2, 4}}, "of this process's batches alone"


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "four"])
def test_what_is_no_number_of_examples_is_refused_before_anything_runs(wrong: Any) -> None:
    with pytest.raises(PolicyError, match=f"examples is {wrong!r}; it is a whole number"):
        CrossAttentionCalibration(examples=wrong)
