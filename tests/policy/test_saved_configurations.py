"""A policy in a configuration file of LightningCLI: what is saved of a run is what the next run reads."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from catp_lightning import PolicyError, PrunedModule, PruningPolicy, TokenPruning
from catp_lightning.policy.sources import policy_or_path

TRAINER = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
DPP = PruningPolicy("catp", {"layers": [0, -1]}, "dpp", {"relevance": -1.5}, keep=1)
FORMS: dict[str, tuple[Any, Any]] = {
    "fields": ({"scorer": "catp", "keep": 0.25}, PruningPolicy("catp", keep=0.25)),
    "one token": ({"keep": 1}, PruningPolicy(keep=1)),
    "all tokens": ({"keep": 1.0}, PruningPolicy(keep=1.0)),
    "fields as a file has them": (DPP.to_dict(), DPP),
    "an object": (
        {"class_path": "catp_lightning.PruningPolicy", "init_args": {"scorer": "stride", "keep": 1}},
        PruningPolicy("stride", keep=1),
    ),
    **{place: (place, place) for place in ("policies/policy.json", "wandb://a/b/policy:v3", "hf://me/policy@v1")},
    "no policy": (None, None),
}


def configuration(*policies: Any, wrapped: bool = False) -> dict[str, Any]:
    """Of a module that one policy wraps, or of a callback for each."""
    if wrapped:
        inner = {"class_path": f"{BoringModel.__module__}.BoringModel"}
        arguments = {"inner": inner, "policy": policies[0]}
        return {"trainer": TRAINER, "model": {"class_path": "catp_lightning.PrunedModule", "init_args": arguments}}
    callbacks = [
        {"class_path": "catp_lightning.TokenPruning", "init_args": {"policy": policy, "stages": []}}
        for policy in policies
    ]
    return {"trainer": {**TRAINER, "callbacks": callbacks}}


def command(file: Path, wrapped: bool, *args: str, print_config: bool = False, **options: Any) -> LightningCLI:
    return LightningCLI(
        LightningModule if wrapped else BoringModel,
        BoringDataModule,
        subclass_mode_model=wrapped,
        args=[*args[:1], "--config", str(file), *args[1:], *(["--print_config"] if print_config else [])],
        **options,
    )


def printed(file: Path, wrapped: bool) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
        command(file, wrapped, "predict", print_config=True)
    assert not end.value.code
    return out.getvalue()


def read(file: Path, wrapped: bool) -> list[Any]:
    """The policies of the module or callbacks that a configuration makes."""
    whole = yaml.safe_load(file.read_text())  # "predict" has options of its own, and only runs
    part = file.with_suffix(".part.yaml")
    part.write_text(yaml.safe_dump({key: whole[key] for key in ("trainer", "model") if key in whole}))
    made = command(part, wrapped, run=False)
    if wrapped:
        assert isinstance(made.model, PrunedModule)
        return [made.model.policy]
    return [callback.policy for callback in made.trainer.callbacks if isinstance(callback, TokenPruning)]


@pytest.mark.parametrize(
    "forms", [tuple(FORMS), ("one token",), pytest.param(("an object",), marks=pytest.mark.slow)], ids=len
)
def test_a_printed_configuration_is_read_as_the_one_it_was_printed_from(tmp_path: Path, forms: tuple[str, ...]) -> None:
    """Those of paths stay paths; one form alone is that of a module."""
    given, expected = zip(*(FORMS[form] for form in forms), strict=True)
    first, second, wrapped = tmp_path / "first.yaml", tmp_path / "second.yaml", len(forms) == 1
    first.write_text(yaml.safe_dump(configuration(*given, wrapped=wrapped)))
    second.write_text(printed(first, wrapped))
    assert printed(second, wrapped) == second.read_text()
    for file in (first, second):
        policies = read(file, wrapped)
        assert policies == list(expected)
        for policy, same in zip(policies, expected, strict=True):
            assert type(getattr(policy, "keep", None)) is type(getattr(same, "keep", None))


@pytest.mark.slow
def test_the_configuration_that_is_saved_of_a_run_runs_again(tmp_path: Path) -> None:
    file = tmp_path / "first.yaml"
    for run in ("one", "two"):
        made = configuration({"scorer": "stride", "keep": 1})
        if run == "one":
            file.write_text(yaml.safe_dump(made))
        folder = tmp_path / run
        command(file, False, "predict", f"--trainer.default_root_dir={folder}", save_config_callback=SaveConfigCallback)
        file = folder / "config.yaml"
        assert read(file, False) == [PruningPolicy("stride", keep=1)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"scorre": "catp"}, "A policy has no field 'scorre'; it has scorer, .*Did you mean 'scorer'"),
        ({"scorer": "cat"}, "There is no scorer 'cat'"),
        ({"keep": 2.5}, r"keep is 2\.5"),
        (
            {"class_path": "pathlib.Path", "init_args": {}},
            "of class_path 'pathlib.Path'.*give a PruningPolicy",
        ),
        ({"class_path": "catp_lightning.PruningPolicy", "init_args": {"keep": 7.5}}, r"keep is 7\.5"),
        (3, "policy is 3; give a PruningPolicy, a path, or the fields of one"),
        ([{"keep": 1}], "policy is .*give a PruningPolicy"),
    ],
)
def test_what_is_no_policy_is_refused_when_the_object_is_made(given: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        TokenPruning(given)
    with pytest.raises(PolicyError, match=says):
        PrunedModule(BoringModel(), given)


def test_a_policy_and_a_path_are_taken_as_they_are(tmp_path: Path) -> None:
    for source in (DPP, "policy.json", tmp_path, None):
        assert policy_or_path(source) is source
