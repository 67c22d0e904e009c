"""ScienceQA: school questions with options."""

from pathlib import Path
from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, file_name, with_options
from catp_lightning.data.benchmarks.references import Choice
from catp_lightning.data.records import field, numbered, read_json
from catp_lightning.errors import DataError

LETTERS = "ABCDE"
"""Letters of options that the evaluation knows; no question of ScienceQA has more options."""


class ScienceQA(Reader):
    """ScienceQA (arXiv 2209.09513): the questions of a split that have an image, known as ScienceQA-IMG.

    The folder has `problems.json`, an object of problems by id with `question`, `choices`, `answer` (number of the
    right choice), `hint`, `image` and `split`; `pid_splits.json`, lists of ids by split; and the images,
    `images/<split of the problem>/<id>/<image>`. A question is asked as its hint, the question, and a line "A. ..." for
    each choice.

    Args:
        folder: the folder with these files, `data/scienceqa` of https://github.com/lupantech/ScienceQA.
        split: a name in `pid_splits.json`: "test" in the published figures.
    """

    metric: ClassVar[str] = "scienceqa"

    def __init__(self, folder: str, split: str = "test") -> None:
        super().__init__(str(Path(folder, "problems.json")), str(Path(folder, "images")))
        self.folder, self.split = folder, split

    def records(self) -> list[Record]:
        problems = read_json(self.questions, "an object of ScienceQA's problems by id")
        if not isinstance(problems, dict):
            raise DataError(f"{self.questions} is not a file of ScienceQA's: it must be an object of problems by id.")
        records = []
        for key in self._ids():
            if key not in problems:
                raise DataError(
                    f"{self.questions} has no problem {key!r:.80}, which pid_splits.json lists in {self.split!r}. Both "
                    "files must be of the same release."
                )
            where = f"{self.questions}, problem {key!r:.80}"
            if field(problems, key, dict, self.questions, "ScienceQA's").get("image"):
                records.append(_record(key, problems[key], where))
        if not records:
            raise DataError(f"{self.questions}: no problem of split {self.split!r} has an image. Choose another split.")
        return records

    def _ids(self) -> list[str]:
        path = str(Path(self.folder, "pid_splits.json"))
        splits = read_json(path, "lists of ScienceQA's problem ids by split")
        if not isinstance(splits, dict) or self.split not in splits:
            known = ", ".join(splits) if isinstance(splits, dict) else "none"
            raise DataError(f"{path} has no split {self.split!r}; there are: {known:.200}.")
        listed = numbered(splits[self.split], path, f"ids of split {self.split!r}")
        return [field({"id": key}, "id", str, where, "ScienceQA's") for where, key in listed]


def _record(key: str, problem: dict[str, object], where: str) -> Record:
    if not key.isascii() or not key.isdigit() or len(key) > 18:
        raise DataError(f"{where}: the id of a problem is a whole number of at most 18 digits. Correct it.")
    question, hint, image, split = (
        field(problem, name, str, where, "ScienceQA's") for name in ("question", "hint", "image", "split")
    )
    choices = field(problem, "choices", list, where, "ScienceQA's")
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: 'choices' must be 2 to {len(LETTERS)} texts, got {choices!r:.200}.")
    answer = field(problem, "answer", int, where, "ScienceQA's")
    if not 0 <= answer < len(choices):
        raise DataError(f"{where}: 'answer' is {answer}; it is the number of a choice, from 0 to {len(choices) - 1}.")
    name = file_name(f"{split}/{key}/{image}", where)
    reference = Choice(tuple(choices), LETTERS[answer])
    return Record(int(key), name, with_options(question, choices, hint), reference, int(key))
