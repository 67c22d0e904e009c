"""A recipe: a published setting of one model, its data sets and budgets, and what was reported there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from catp_lightning.errors import DataError, PolicyError, did_you_mean
from catp_lightning.policy.budgets import check_keep
from catp_lightning.policy.typed import build
from catp_lightning.utils.files import read_bytes

PLACES = ("questions", "annotations", "images", "folder")
"""Arguments of readers and splits that name files or folders below the user's folder of data."""
VQA = "catp_lightning.data.vqa.VQADataModule"


@dataclass(frozen=True)
class Task:
    """One data set of a recipe.

    Attributes:
        name: name of the task in this recipe, and of its folder of results.
        questions: number of questions that are answered, of which the time is estimated.
        data: `class_path` and `init_args` of the datamodule, without `processor`; files are below the folder of data.
    """

    name: str
    questions: int
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name is {self.name!r}; it names a folder: letters, digits and '-'.")
        if self.questions < 1:
            raise ValueError(f"questions is {self.questions}; it is at least 1.")

    def places(self, folder: Path) -> list[Path]:
        """Return the files and folders that the task reads, each once; `folder` is the folder of data."""
        splits = [split for split in self.data["init_args"].values() if isinstance(split, Mapping)]
        return list(dict.fromkeys(place for split in splits for place in _places(split, folder)))

    def configured(self, folder: Path, processor: str) -> dict[str, Any]:
        """Return `class_path` and `init_args` of the datamodule, with the places of files and the model's processor."""
        arguments = {"processor": processor, **_placed(self.data["init_args"], folder)}
        return {"class_path": self.data["class_path"], "init_args": arguments}


@dataclass(frozen=True)
class Published:
    """What was reported of one method, at several budgets.

    Attributes:
        method: the method, by its name here where it is one of `SCORERS`.
        task: name of a task, or what several were averaged to, in words.
        measure: what the values are, in words: "% of unpruned".
        source: where they were reported, with an arXiv number.
        keep: budgets; a value 1.0 stands for the unpruned model.
        values: one for each budget; None: not known.
    """

    method: str
    task: str
    measure: str
    source: str
    keep: tuple[int | float, ...]
    values: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if len(self.keep) != len(self.values):
            raise ValueError(f"there are {len(self.values)} values for {len(self.keep)} budgets; one for each.")
        for keep in self.keep:
            check_keep(keep)

    @property
    def known(self) -> dict[int | float, float]:
        """Values by budget, without those that are not known."""
        pairs = zip(self.keep, self.values, strict=True)
        return {keep: value for keep, value in pairs if value is not None}


@dataclass(frozen=True)
class Recipe:
    """A published setting of one model.

    Attributes:
        name: name of its file.
        about: the setting, in a line.
        source: where it is from, with an arXiv number.
        parameters: about how many parameters the model has.
        visual_tokens: visual tokens of an image of usual size, unpruned.
        keep: budgets at which methods are compared.
        scorers: methods that `catp recipe run` compares, as `catp sweep --scorers` takes them.
        layers: compare attention scorers with each single layer as well.
        published: what was reported.
        notes: what differs from the publication, or is not there.
        model: arguments of `VQAModule`.
        trainer: arguments of the Trainer.
        tasks: the data sets.
    """

    name: str
    about: str
    source: str
    parameters: float
    visual_tokens: int
    keep: tuple[int | float, ...]
    scorers: tuple[str, ...]
    layers: bool = False
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[Task, ...] = ()

    def __post_init__(self) -> None:
        for keep in self.keep:
            check_keep(keep)
        if not self.keep or not self.scorers:
            raise ValueError("it needs at least one budget in keep, and one method in scorers.")

    def task(self, name: str) -> Task:
        """Return a task by its name; DataError if there is none of that name."""
        for task in self.tasks:
            if task.name == name:
                return task
        known = [task.name for task in self.tasks]
        raise DataError(f"{self.name} has no task {name!r}; it has {', '.join(known)}.{did_you_mean(name, known)}")

    def configuration(self, task: Task, folder: Path, model: str | None = None) -> dict[str, Any]:
        """Return the configuration of `catp sweep` for one task.

        Args:
            task: one of `tasks`.
            folder: folder of data, in which its files are.
            model: folder or name of another model of the same class, with its processor; None: the recipe's.
        """
        given = {**self.model, "model": model or self.model["model"]}
        return {
            "model": given,
            "data": task.configured(folder, given["model"]),
            "trainer": dict(self.trainer),
            "keep": list(self.keep),
            "scorers": list(self.scorers),
            "layers": self.layers,
        }


def names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped() if path.name.endswith(".yaml"))


def read(name: str) -> Recipe:
    """Return a recipe by its name, or from a YAML file.

    Raises:
        DataError: there is no such recipe, or its file is not one; the message says what is wrong in it.
    """
    known = {path.name.removesuffix(".yaml"): path for path in _shipped()}
    file: Any = known.get(name, Path(name))
    if name not in known and (not name.endswith((".yaml", ".yml")) or not Path(name).is_file()):
        raise DataError(
            f"There is no recipe {name!r:.200}; there are {', '.join(names())}, and YAML files of your own by their "
            f"path.{did_you_mean(name, known)}"
        )
    try:
        content = yaml.safe_load(read_bytes(file, 2**20) if isinstance(file, Path) else file.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"The recipe {file} cannot be read: {error!s:.500}") from error
    try:
        return _recipe(Path(name).stem if name not in known else name, content)
    except PolicyError as error:
        raise DataError(f"{file}: {error}") from error


def _recipe(name: str, content: Any) -> Recipe:
    if not isinstance(content, Mapping):
        raise PolicyError(f"a recipe is an object with a name for each value, not {content!r:.80}.")
    values = {key: value for key, value in content.items() if key != "common"}  # for YAML's anchors alone
    mappings: dict[str, Any] = {key: _mapping(values.pop(key, {}), key) for key in ("model", "trainer")}
    if not isinstance(mappings["model"].get("model"), str):
        raise PolicyError("model.model is missing: the folder or name of the model.")
    listed = values.pop("tasks", None)
    if not isinstance(listed, list) or not listed:
        raise PolicyError(f"tasks is {listed!r:.80}; it is a list of data sets.")
    tasks = tuple(_task(task, f"task {number}") for number, task in enumerate(listed, 1))
    if len({task.name for task in tasks}) < len(tasks):
        raise PolicyError(f"tasks are {', '.join(task.name for task in tasks)}; each has a name of its own.")
    return replace(build(Recipe, {"name": name, **values}, "the recipe"), **mappings, tasks=tasks)


def _task(value: Any, what: str) -> Task:
    values = dict(_mapping(value, what))
    data = _mapping(values.pop("data", {}), f"data of {what}")
    return replace(build(Task, values, what), data={"class_path": VQA, "init_args": {}, **data})


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PolicyError(f"{what} is {value!r:.80}; it is an object of values by name.")
    return value


def _shipped() -> list[Any]:
    found = find_spec("catp_lightning.configs")
    return [] if found is None else sorted(files("catp_lightning.configs").joinpath("recipes").iterdir(), key=str)


def _places(split: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    for key, value in split.items():
        if isinstance(value, Mapping):
            yield from _places(value, folder)
        elif key in PLACES:
            yield folder / value


def _placed(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return values in which places of files are below a folder, in whatever they are nested."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        found[key] = _placed(value, folder) if nested else str(folder / value) if key in PLACES else value
    return found
