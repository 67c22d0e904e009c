"""Recipes: their files are complete, and what is wrong in one is told."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from catp_lightning.data import SHIPPED
from catp_lightning.data.benchmarks import BenchmarkDataModule
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.errors import DataError
from catp_lightning.evaluation.recipes import Recipe, names, read
from catp_lightning.evaluation.recipes.estimate import jobs, missing, require_files, seconds, size_of
from catp_lightning.evaluation.recipes.shown import lines, yours
from catp_lightning.evaluation.sweep.methods import check_names
from tests.support.paths import ROOT
from tests.support.recipe_files import write_data
from tests.support.sweeps import JOBS, METHODS

DATAMODULES = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in (VQADataModule,)}
DATAMODULES["catp_lightning.data.benchmarks.BenchmarkDataModule"] = BenchmarkDataModule


def recipe(**changes: Any) -> Recipe:
    content = yaml.safe_load((ROOT / "configs/recipes/catp-blip2-opt-2.7b.yaml").read_text())
    file = Path("own.yaml")
    file.write_text(yaml.safe_dump({**content, **changes}))
    return read(str(file))


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_published_settings_and_the_shipped_models_have_recipes() -> None:
    budgets = {name: read(name).keep for name in names()}
    assert budgets["catp-blip2-opt-2.7b"] == (16, 8, 4)
    assert {192, 128, 64, 58, 29} <= set(budgets["fastervlm-llava-1.5-7b"])
    assert {640, 320, 160} <= set(budgets["fastervlm-llava-next-7b"])
    assert {"trimmed-llama-3.2-11b-vision", "qwen2.5-vl-7b", "internvl3-8b"} <= budgets.keys()
    assert {read(name).model["model"] for name in names()} >= set(SHIPPED)
    assert sorted(path.stem for path in (ROOT / "configs/recipes").glob("*.yaml")) == names()


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_complete(name: str) -> None:
    found = read(name)
    check_names(found.scorers)
    for one in found.published:
        assert set(one.keep) <= {*found.keep, 1.0} and re.search(r"arXiv \d{4}\.\d{4,5}", one.source)
    for task in found.tasks:
        arguments = task.configured(Path("data"), "processor")["init_args"]
        module: Any = DATAMODULES[task.data["class_path"]](**arguments)  # refuses other names, and prompts without {}
        places = task.places(Path("data"))
        assert module.splits["test"] or (module.splits["val"] and module.splits["calibration"])
        assert len(places) >= 2 and all(place.is_relative_to("data") for place in places)


def test_known_figures_are_those_of_their_sources() -> None:
    (reported,) = (one for one in read("fastervlm-llava-1.5-7b").published if one.method == "fastervlm")
    assert reported.known == {288: 100.12, 144: 98.75, 58: 94.24, 29: 89.41} and "2412.01818" in reported.source
    layers = {one.method: one.known for one in read("catp-blip2-opt-2.7b").published}
    assert layers["no pruning"] == {1.0: 52.14} and layers["catp layer 5"] == {16: 43.79, 8: 34.66, 4: 23.70}
    assert layers["catp"] == {}, "not known, and not invented"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kep": [4]}, "has no argument 'kep'"),
        ({"keep": [0]}, "keep"),
        ({"keep": []}, "at least one budget"),
        ({"scorers": "catp"}, "scorers of the recipe is 'catp'; allowed is a list"),
        ({"tasks": []}, r"tasks is \[\]; it is a list"),
        ({"tasks": [{"name": "../a", "questions": 4}]}, "'../a'; it names a folder"),
        ({"tasks": [{"name": "a", "questions": 0}]}, "questions is 0; it is at least 1"),
        ({"tasks": [{"name": "a", "questions": 1}] * 2}, "tasks are a, a; each has a name of its own"),
        ({"model": {}}, "model.model is missing"),
        ({"published": [{"method": "catp"}]}, "lacks task, measure, source, keep, values"),
        (
            {"published": [{"method": "a", "task": "b", "measure": "c", "source": "d", "keep": [4, 2], "values": [1]}]},
            "1 values for 2 budgets",
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told) as raised:
        recipe(**changes)
    assert str(raised.value).startswith("own.yaml: ")


def test_a_recipe_that_is_not_there_is_told() -> None:
    with pytest.raises(DataError, match=r"no recipe 'digits-blip3'; there are .*Did you mean 'digits-blip2'\?"):
        read("digits-blip3")
    Path("broken.yaml").write_text("keep: [")
    with pytest.raises(DataError, match=r"broken.yaml cannot be read"):
        read("broken.yaml")
    with pytest.raises(DataError, match=r"has no task 'gqu'; it has vqav2, gqa.*Did you mean 'gqa'"):
        read("fastervlm-llava-1.5-7b").task("gqu")


def test_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    for name in names():
        assert missing(read(name).tasks, folder) == [], name
    found = read("fastervlm-llava-1.5-7b")
    lost = folder / "gqa/testdev_balanced_questions.json"
    lost.unlink()
    assert missing(found.tasks, folder) == [lost]
    with pytest.raises(DataError, match=r"1 files or folders that are not there: .*testdev_balanced_questions.json"):
        require_files(found, found.tasks, folder)
    require_files(found, [found.task("mme")], folder)
    places = found.task("mme").places(Path("data"))
    assert {Path("data/mme/MME_Benchmark_release_version"), Path("data/gqa/images")} <= set(places)


def test_the_size_is_counted_from_a_config_without_weights() -> None:
    found = read("digits-blip2")
    counted = size_of(found, str(ROOT / "catp_lightning/data/digits_blip2"))
    assert counted.counted and counted.parameters == 1450272 and counted.bytes_each == 4
    told = size_of(read("catp-blip2-opt-2.7b"), "nobody/has-this-one")
    assert not told.counted and told.weights == 2 * 3.74e9


def test_jobs_are_as_many_as_a_sweep_has_at_most() -> None:
    assert jobs([name for name in METHODS if name != "fastervlm"], 2) == JOBS + 1
    assert jobs(["calibrated", "stride"], 3, draws=2) == 10


def test_the_time_is_the_arithmetic_that_is_told() -> None:
    found = read("fastervlm-llava-1.5-7b")
    size = size_of(found, "nobody/has-this-one")
    prefill, decoding = 2 * 7.06e9 * (576 + 64) / 1e14, 16 * 2 * 7.06e9 / 1e12 / 16
    assert seconds(found, found.task("mme"), size, 3) == pytest.approx(3 * 2374 * (prefill + decoding))


def test_what_a_run_found_stands_beside_what_was_published() -> None:
    found = read("fastervlm-llava-1.5-7b")
    rows = [{"method": "no pruning", "keep": None, "accuracy": 0.8, "accuracy_share": 1.0},
            {"method": "fastervlm", "keep": 58, "accuracy": 0.6, "accuracy_share": 0.75}]  # fmt: skip
    tables = {"gqa": rows, "mme": [rows[0], {**rows[1], "accuracy_share": 0.85}]}
    (reported,) = (one for one in found.published if one.method == "fastervlm")
    assert yours(found, reported, 58, tables) == (pytest.approx(80.0), 2)
    assert yours(found, reported, 29, tables) is None
    (line,) = (line for line in lines(found, tables) if line[1] == "fastervlm" and line[2] == "58")
    assert line[4:6] == ("94.24", "80.00 (mean of 2)")
    catp = read("catp-blip2-opt-2.7b")
    assert yours(catp, catp.published[0], 1.0, {"vqav2": rows}) == (80.0, 1), "in percent, not of unpruned"
    seed = read("trimmed-llama-3.2-11b-vision")
    assert yours(seed, seed.published[0], 0.25, {"mme": rows}) is None, "its task has no reader"
