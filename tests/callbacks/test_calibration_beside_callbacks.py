"""CrossAttentionCalibration beside everything else that Lightning brings: callbacks, loops, settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from catp_lightning import CrossAttentionCalibration, PrunedModule, PruningError, PruningPolicy
from tests.support.calibrations import data
from tests.support.footprints import footprint
from tests.support.models import SHORT
from tests.support.modules import Generating
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_report")


class Several(Generating):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # type: ignore[override]
        return super().predict_step(batch, batch_idx)


def loader(start: int = 0, stop: int = 3) -> DataLoader[Any]:
    return loading(data(24, 8)[start:stop])


def calibrated(
    path: Path, *neighbours: Callback, module: Generating | None = None, first: bool = True, **settings: Any
) -> dict[str, Any]:
    """The policy that a run beside `neighbours` ends in; its predictions and the model are those of a run without."""
    module = Several() if module is None else module
    before, callback = footprint(module), CrossAttentionCalibration(path, scorer="catp", settings=QUICKEST)
    loaders = settings.pop("loaders", None) or loader()
    callbacks = [callback, *neighbours] if first else [*neighbours, callback]
    returned = trainer(*callbacks, **settings).predict(module, loaders) or []
    flat = [batch for one in returned for batch in one] if isinstance(loaders, list) else returned
    expected = [module.net.generate(**batch, **SHORT) for batch in data(24, 8)]
    assert all(map(torch.equal, flat, expected))
    assert footprint(module) == before
    return PruningPolicy.load(path).to_dict() if path.exists() else {}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    policy = calibrated(tmp_path_factory.mktemp("plain") / "policy.json")
    assert sum(policy["evidence"]["samples"].values()) == 24
    return policy


class Asks(Callback):
    """A neighbour that asks the model something of its own in every hook of the loop, and even samples the answer."""

    def __init__(self, module: Generating) -> None:
        self.module, self.count = module, 0
        for moment in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end"):
            setattr(self, f"on_predict_{moment}", self.ask)

    def ask(self, *args: Any) -> None:
        one = {name: value[:1] for name, value in data(24, 8)[1].items()}
        self.module.net.generate(**one, **{**SHORT, "do_sample": True})
        self.count += 1


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["after it", "before it"])
def test_what_other_callbacks_ask_the_model_is_not_calibrated_on(
    plain: dict[str, Any], tmp_path: Path, first: bool
) -> None:
    module = Several()
    is_prompt = Asks(module)
    assert calibrated(tmp_path / "policy.json", is_prompt, module=module, first=first) == plain
    assert is_prompt.count == 10  # three batches


SETTINGS: dict[str, dict[str, Any]] = {
    "several loaders": {"loaders": [loader(0, 2), loader(2, 3)]},
    "rich": {"neighbours": [RichProgressBar()], "enable_progress_bar": True},
    "tqdm": {"neighbours": [TQDMProgressBar()], "enable_progress_bar": True},
    "barebones": {"barebones": True, "logger": None, "enable_progress_bar": None, "enable_model_summary": None},
    "inference_mode=False": {"inference_mode": False},
    "deterministic": {"deterministic": True},
    "profiler": {"profiler": "simple"},
}


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


SLOW = ("rich", "tqdm", "inference_mode=False", "deterministic", "profiler")


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SETTINGS]
)
def test_under_every_setting_of_the_trainer_the_policy_is_the_same(
    plain: dict[str, Any], name: str, tmp_path: Path
) -> None:
    settings = dict(SETTINGS[name])
    assert calibrated(tmp_path / "policy.json", *settings.pop("neighbours", []), **settings) == plain


def test_a_module_may_bring_it_itself(plain: dict[str, Any], tmp_path: Path) -> None:
    class Brings(Generating):
        def configure_callbacks(self) -> list[Callback]:
            return [CrossAttentionCalibration(tmp_path / "policy.json", scorer="catp", settings=QUICKEST)]

    trainer().predict(Brings(), loader())
    assert PruningPolicy.load(tmp_path / "policy.json").to_dict() == plain


@pytest.mark.slow
def test_a_limit_of_batches_is_kept_and_a_split_without_a_batch_writes_nothing(tmp_path: Path) -> None:
    policy = calibrated(tmp_path / "two" / "policy.json", limit_predict_batches=2)
    assert sum(policy["evidence"]["samples"].values()) == 16
    with pytest.warns(UserWarning, match="CrossAttentionCalibration read no batch"):
        assert not calibrated(tmp_path / "none" / "policy.json", limit_predict_batches=0)
    assert not (tmp_path / "none").exists()


def test_a_fast_dev_run_does_everything_but_leaves_the_policy_that_was_measured(
    plain: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "policy.json"
    PruningPolicy.from_dict(plain).save(path)
    with caplog.at_level("INFO"):
        assert calibrated(path, fast_dev_run=True) == plain
    assert "nothing is saved by a fast_dev_run" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]


def test_a_wrapper_that_prunes_is_not_calibrated(tmp_path: Path) -> None:
    module = Generating()
    before = footprint(module)
    callback = CrossAttentionCalibration(tmp_path / "policy.json")
    with pytest.raises(PruningError, match="being pruned already, or calibrated"):
        trainer(callback).predict(PrunedModule(module, PruningPolicy()), loader())
    assert footprint(module) == before
