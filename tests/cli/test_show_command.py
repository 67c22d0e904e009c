"""`catp show`: the pictures it writes, of any module and data."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catp_lightning import PruningPolicy, TokenPruning, VQAModule, plots
from catp_lightning.cli import show
from catp_lightning.data.vqa import VQADataModule, VQASplit
from tests.support.commands import catp, fails, split
from tests.support.trainers import trainer

TWO = ["--data.batch_size", "2"]  # samples


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def data(made: Path) -> VQADataModule:
    return VQADataModule(str(made / "model"), test=VQASplit(**split(made / "test")), batch_size=2)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


@pytest.mark.slow
def test_the_first_samples_of_the_first_batch_are_drawn_as_the_plots_draw_them(made, capsys):
    catp(made, "show", *TWO, "--scorer", "catp", "--keep", 2, "--output", "pictures")
    assert "pictures of 2 samples in pictures" in capsys.readouterr().out
    assert names("pictures") == {f"0{number}-{kind}.png" for number in range(2) for kind in ("kept", "scores")}
    module, callback = VQAModule(str(made / "model")), TokenPruning(PruningPolicy("catp", keep=2), log_images=2)
    trainer(callback, limit_predict_batches=1).predict(module, data(made))
    for number, shown in enumerate(callback.shown):
        assert int(shown.last.keep.sum()) == 2
        expected = pixels(plots.kept_tokens(shown).png())
        assert np.array_equal(pixels(Path(f"pictures/0{number}-kept.png").read_bytes()), expected), number


@pytest.mark.slow
def test_several_budgets_are_side_by_side_with_the_answers_that_were_given(made, monkeypatch):
    monkeypatch.setattr(show, "SAMPLES", 3)  # of two batches
    more = ["--trainer.limit_predict_batches", 2, "--output", "pictures"]
    catp(made, "show", *TWO, "--scorer", "l2-norm", "--keep", "[0.5, 1]", *more)
    kinds = ["budgets", *(f"{kind}-{keep}" for kind in ("kept", "scores") for keep in ("0.5", "1"))]
    assert names("pictures") == {f"0{number}-{kind}.png" for number in range(3) for kind in kinds}
    module = VQAModule(str(made / "model"), generation={"max_new_tokens": 4})
    columns = []
    for policy in (PruningPolicy(keep=1.0), PruningPolicy("l2-norm", keep=0.5), PruningPolicy("l2-norm", keep=1)):
        callback = TokenPruning(policy, log_images=3)
        answers = trainer(callback, limit_predict_batches=2).predict(module, data(made))
        texts = [answer["answer"] for batch in answers for answer in batch]
        columns.append(list(zip(callback.shown, texts, strict=False)))
    assert len({answer for column in columns for _, answer in column}) > 1, "or their order proves nothing"
    for number, same in enumerate(zip(*columns, strict=True)):
        expected = pixels(plots.by_budget(same).png())
        assert np.array_equal(pixels(Path(f"pictures/0{number}-budgets.png").read_bytes()), expected), number


@pytest.mark.slow
def test_layers_and_merging_are_drawn_where_a_policy_has_them(made):
    method = ["--scorer", "fastv", "--scorer_args", "{layer: 1}", "--selector", "recycle"]
    catp(made, "show", "--data.batch_size", 1, *method, "--output", "pictures")
    assert names("pictures") == {f"00-{kind}.png" for kind in ("kept", "scores", "merged", "layers")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "Give --policy or --scorer"),
        (["--scorer", "stride", "--keep", "[]"], "--keep is an empty list"),
        (["--scorer", "stride", "--keep", "[0.5, 2.5]"], "keep is 2.5"),
        (["--scorer", "stride", "--output", "file"], "a folder is to be written"),
        (["--scorer", "fastervlm"], "does not show"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_work_begins(made, capsys, args, said):
    Path("file").write_text("mine\n")
    status, message = fails(capsys, "show", "--config", made / "tiny.yaml", *args)
    assert status == 2
    assert said in message


@pytest.mark.slow
def test_other_samples_each_time_are_refused_at_several_budgets(made, capsys):
    given = {"processor": str(made / "model"), "batch_size": 2, "test": split(made / "test")}
    data = {"class_path": "tests.support.shuffled.Shuffled", "init_args": given}
    args = ["show", "--config", made / "tiny.yaml", "--data", json.dumps(data), "--scorer", "l2-norm"]
    status, message = fails(capsys, *args, "--keep", "[0.5, 0.25]", "--output", "pictures")
    assert status == 1
    assert "a loader that does not shuffle" in message
