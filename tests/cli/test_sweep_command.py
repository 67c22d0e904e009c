"""`catp sweep` with a user's own classes and files, and what it refuses."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from PIL import Image

from catp_lightning.cli.lists import budgets, listed
from catp_lightning.cli.main import main
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.scenes import CELL, write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.errors import PolicyError
from catp_lightning.evaluation.sweep.methods import named
from catp_lightning.modules.vqa import VQAModule
from tests.support.paths import ROOT
from tests.support.sweeps import outcome, sweep, table


class OwnModule(VQAModule):
    """Counts what reaches it."""

    moved = 0


class OwnData(LightningDataModule):
    """A user's datamodule: validation alone, batches without image ids and answers, a hook that moves pixels."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        files = (f"{folder}/questions.json", f"{folder}/images", None, "{image_id:012d}.png")
        self.data = VQADataModule(str(shipped("digits_blip2")), val=VQASplit(*files), batch_size=8)

    def setup(self, stage: str) -> None:
        assert stage == "validate"

    def val_dataloader(self) -> Any:
        wanted = ("inputs", "question_ids")
        batches = [{key: batch[key] for key in wanted} for batch in self.data.val_dataloader()]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        OwnModule.moved += len(batch["question_ids"])
        return batch


@pytest.mark.slow
def test_a_model_and_data_of_ones_own(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", "test", 16)
    config = {
        "model": {"class_path": f"{__name__}.OwnModule", "init_args": {"model": "digits_blip2"}},
        "data": {"class_path": f"{__name__}.OwnData", "init_args": {"folder": str(tmp_path / "data")}},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    OwnModule.moved = 0
    scorers = ["--scorers", "[stride, calibrated]", "--keep", "0.5", "--output", str(tmp_path / "out")]
    main(["sweep", "--config", str(tmp_path / "own.yaml"), *scorers])
    assert OwnModule.moved == 2 * 16, "unpruned and pruned, through the datamodule's hooks"
    row = table(tmp_path / "out")["stride", "0.5"]
    assert "accuracy" not in row and 0 <= row["agreement"] <= 1 and row["tokens"] == 16
    text = (tmp_path / "out/digits_blip2/table.md").read_text()
    assert "16 questions about 16 images" in text and "- calibrated: The data has no calibration split." in text


@pytest.mark.slow
def test_a_checkpoint_gives_its_weights_and_an_accuracy_of_0_has_no_share(tmp_path: Path) -> None:
    module = VQAModule(str(shipped("digits_blip2")))
    with torch.no_grad():
        for parameter in module.model.language_model.parameters():
            parameter.zero_()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "zero.ckpt")
    args = ["--models", "digits_blip2", "--scorers", "stride", "--keep", "2"]
    plain = sweep(tmp_path / "out", *args)
    assert table(plain)["no pruning", "None"]["accuracy"] > 0.8
    assert set(
        outcome(sweep(tmp_path / "out", *args, "--ckpt_path", tmp_path / "zero.ckpt"), "stride-keep-2.json")["answers"]
    ) == {""}
    assert table(plain)["stride", "2"]["accuracy_share"] is None
    assert "| stride" not in (plain / "digits_blip2/table.md").read_text()
    assert (
        "| **stride** (control) | 0.000 (0.000 to 0.000) | - | 1.000" in (plain / "digits_blip2/table.md").read_text()
    )


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *map(str, args)])
    assert stopped.value.code in (1, 2)
    return " ".join(capsys.readouterr().err.partition("catp: error: ")[2].split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--scorers", "fastvlm"],
            r"no scorer 'fastvlm'; known are all, calibrated, catp, .*Did you mean 'fastervlm'\?",
        ),
        (["--scorers", ""], "No scorer is named"),
        (["--keep", "0.5,0.5"], "give one budget or several different ones"),
        (["--keep", "1.5"], "keep is 1.5; keep is a share"),
        (["--keep", "half"], "keep is 'half'; keep is a share"),
        (["--models", "digits_blip"], "no shipped model 'digits_blip'; there are: digits_blip2, digits_llava"),
        (["--config", "mine.yaml", "--models", "digits_blip2"], "give one of them"),
        (["--questions", "many"], "questions"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch, capsys, args, message
) -> None:
    monkeypatch.chdir(tmp_path)
    found = refused(capsys, *args)
    assert re.search(message, found), found
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reference_that_is_not_compared_is_refused_with_what_is(tmp_path: Path, capsys) -> None:
    options = ["--questions", 8, "--calibration_questions", 8, "--output", tmp_path, "--scorers", "stride,random"]
    found = refused(capsys, "--models", "digits_blip2", *options, "--reference", "catp")
    assert "The reference 'catp' is not among the methods" in found and "stride, random (3 seeds)" in found
    assert not list(tmp_path.rglob("jobs"))


def test_names_and_budgets_are_lists_or_text() -> None:
    assert listed("a, b") == listed("[a, b]") == listed("['a', \"b\"]") == listed(["a", "b"]) == ["a", "b"]
    assert [repr(keep) for keep in budgets("1, 1.0,0.05")] == ["1", "1.0", "0.05"]
    assert [repr(keep) for keep in budgets([1, 0.5])] == ["1", "0.5"]
    assert named(["stride", "all", "stride"])[0] == "stride" and len(named(["all"])) == len(set(named(["all", "all"])))
    with pytest.raises(PolicyError, match="True"):
        budgets([True])


@pytest.mark.parametrize("model", SHIPPED)
def test_scenes_and_prompts_of_a_shipped_model_are_those_of_its_configuration(tmp_path, monkeypatch, model) -> None:
    config = yaml.safe_load((ROOT / f"configs/{model}.yaml").read_text())
    assert config["model"]["model"] == config["data"]["processor"] == model
    assert config["data"].get("prompt", VQADataModule("x").prompt) == PROMPTS[model]
    monkeypatch.chdir(tmp_path)
    folder = str(Path(config["data"]["test"]["questions"]).parents[1])
    main(["scenes", "--model", model, "--output", folder, "--questions", "16", "--calibration_questions", "4"])
    for split in ("calibration", "test"):
        assert Path(config["data"][split]["questions"]).is_file() and Path(config["data"][split]["images"]).is_dir()
    sizes = {Image.open(path).size for path in Path(config["data"]["test"]["images"]).iterdir()}
    assert sizes <= {(CELL * columns, CELL * rows) for rows, columns in GRIDS[model]}
    assert len(sizes) > 1 or len(GRIDS[model]) == 1
