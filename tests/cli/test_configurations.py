"""The shipped configurations."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import catp_lightning
from catp_lightning.cli.main import main
from catp_lightning.data import SHIPPED
from tests.support.commands import CONFIGS, fails, printed
from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_read_and_printed_whole(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--config", str(ROOT / "configs" / name), "--print_config"])
    assert stopped.value.code == 0
    config, given = (yaml.safe_load(text) for text in (capsys.readouterr().out, (ROOT / "configs" / name).read_text()))
    assert config["model"]["init_args"]["model"] == given["model"]["model"]
    for split_name in ("calibration", "val"):
        assert given["data"][split_name].items() <= config["data"]["init_args"][split_name].items()


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_the_vqav2_configuration_runs_on_data_in_its_places(made, capsys):
    for split_name, image_split in (("calibration", "train2014"), ("test", "val2014")):
        folder = Path("data/vqav2")
        (folder / image_split).mkdir(parents=True)
        shutil.copy(made / split_name / "questions.json", folder / f"v2_OpenEnded_mscoco_{image_split}_questions.json")
        shutil.copy(made / split_name / "annotations.json", folder / f"v2_mscoco_{image_split}_annotations.json")
        for image in (made / split_name / "images").iterdir():
            shutil.copy(image, folder / image_split / f"COCO_{image_split}_{image.stem}.jpg")
    options = ["--model.model", str(made / "model"), "--data.processor", str(made / "model"), "--data.num_workers", "0"]
    config = ["--config", str(ROOT / "configs/blip2_opt_vqav2.yaml"), "--trainer.accelerator", "cpu"]
    main(["calibrate", *config, *options, "--data.fraction", "1.0", "--scorer", "stride", "--output", "policy.json"])
    main(["validate", *config, *options, "--policy", "policy.json", "--compare", "true"])
    assert printed(capsys.readouterr().out)["catp/keep_share"] == 0.5


@pytest.mark.slow
def test_the_digits_configuration_runs_by_its_name_on_the_shipped_model(monkeypatch, capsys):
    # As in an installed wheel, where configs/ is catp_lightning.configs.
    monkeypatch.setattr(catp_lightning, "__path__", [*catp_lightning.__path__, str(ROOT)])
    main(["scenes", "--questions", "60", "--calibration_questions", "64"])
    main(["test", "--config", "digits_blip2.yaml", "--trainer.accelerator", "cpu"])
    assert printed(capsys.readouterr().out)["test/vqa_accuracy"] > 0.8
    assert len(json.loads(Path("data/digits/calibration/questions.json").read_text())["questions"]) == 64


@pytest.mark.parametrize("model", SHIPPED)
def test_scenes_are_written_where_the_configuration_of_their_model_reads_them(model):
    main(["scenes", "--model", model, "--questions", "1", "--calibration_questions", "1"])
    data = yaml.safe_load((ROOT / f"configs/{model}.yaml").read_text())["data"]
    for split in ("calibration", "test"):
        assert all(Path(data[split][name]).exists() for name in ("questions", "annotations", "images"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "scenes"),
    [
        ("digits_blip2.yaml", "`catp scenes`"),
        ("digits_llava.yaml", "`catp scenes --model digits_llava --output data/digits_llava`"),
    ],
)
def test_a_shipped_configuration_without_its_scenes_names_the_command_that_writes_them(capsys, config, scenes):
    for command in ("test", "sweep --output new"):
        status, message = fails(capsys, *command.split(), "--config", ROOT / "configs" / config)
        assert message.endswith(f"{scenes} writes it.\n")
        assert status == 2
