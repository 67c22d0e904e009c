"""A calibration under W&B, offline: what the run file itself holds, read back with wandb's own protobufs."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger

from catp_lightning import PruningPolicy
from catp_lightning.calibration.report.report import COLUMNS, report_folder
from catp_lightning.callbacks import CrossAttentionCalibration
from tests.support.calibrations import data
from tests.support.models import faint_blip2, greedily
from tests.support.modules import Generating
from tests.support.run_files import complete, history_of
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer


@pytest.fixture
def run(tmp_path: Path, one_pixel: None) -> tuple[list[Any], list[PruningPolicy], Path]:
    import wandb

    logger = WandbLogger(project="catp", save_dir=str(tmp_path), offline=True)
    callback = CrossAttentionCalibration(
        tmp_path / "policies", keep=[0.5, 2], scorer="catp", settings=QUICKEST, examples=0
    )
    trainer(callback, logger=logger).predict(Generating(faint_blip2(0.2), greedily(1)), loading(data(32, 32)))
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    return complete(file), callback.policies, file.parent


def test_the_run_holds_configuration_tables_figures_and_the_policy(
    run: tuple[list[Any], list[PruningPolicy], Path],
) -> None:
    found, policies, folder = run
    config = {}
    history = {name: value for step in history_of(found) for name, value in step.items()}
    artifacts = []
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind in ("config", "run"):  # older versions keep it with the run
            source = record.config if kind == "config" else record.run.config
            config |= {update.key or update.nested_key[0]: json.loads(update.value_json) for update in source.update}
        elif kind == "artifact":
            artifacts.append(record.artifact)
    assert config["catp"]["budgets"] == [0.5, 2] and config["catp"]["model"]["type"] == "blip-2"
    assert config["catp"]["chosen"] == {str(p.keep): p.evidence["chosen"] for p in policies}
    for policy in policies:
        best = next(row for row in policy.evidence["candidates"] if row["name"] == policy.evidence["chosen"])
        assert history[f"catp/keep-{policy.keep}/agreement"] == pytest.approx(best["check"]["agreement"])
        table = history[f"catp/keep-{policy.keep}/candidates"]
        assert table["nrows"] == len(policy.evidence["candidates"]) and table["ncols"] == len(COLUMNS)
        stored = json.loads((folder / "files" / table["path"]).read_text())
        assert [row[:3] for row in stored["data"]] == [
            [row["name"], row["control"], row["choose"]["samples"]] for row in policy.evidence["candidates"]
        ]
    report = report_folder(folder.parents[1] / "policies")
    figures = {file.stem: file.read_bytes() for file in report.glob("*.png")}
    assert figures.keys() >= {"retention", "layers", "slots", "rank_correlation"}
    for name, image in figures.items():
        assert (folder / "files" / history[f"catp/{name}"]["path"]).read_bytes() == image
        assert (folder / "files/report" / f"{name}.png").read_bytes() == image
    assert (folder / "files/report/report.md").read_text() == (report / "report.md").read_text()
    policy_artifacts = [artifact for artifact in artifacts if artifact.type == "catp-policy"]
    assert len(policy_artifacts) == 1
    assert sorted(entry.path for entry in policy_artifacts[0].manifest.contents) == ["keep-0.5.json", "keep-2.json"]
    for policy in policies:
        staged = next(e for e in policy_artifacts[0].manifest.contents if e.path == f"keep-{policy.keep}.json")
        assert PruningPolicy.load(staged.local_path) == policy
        assert PruningPolicy.load(folder / "files" / f"keep-{policy.keep}.json") == policy, "beside the run"
