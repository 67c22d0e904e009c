"""MMBench: questions with options, whose options are rotated."""

import base64
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, with_options
from catp_lightning.data.benchmarks.references import Rotation
from catp_lightning.data.benchmarks.tsv import read_tsv
from catp_lightning.data.images import image_from
from catp_lightning.data.vqa_dataset import Visual
from catp_lightning.errors import DataError

ROTATION = 10**6
"""Ids of the rotations of question i are i, i + ROTATION, i + 2 * ROTATION and so on."""

_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_MISSING = ("", "nan", "none")  # as LLaVA's evaluation reads them, in any letter case
_LONGEST_INDEX = 64  # characters; a longer cell is an image


class MMBench(Reader):
    """MMBench (arXiv 2307.06281), questions with up to four options.

    The file is a table with tabs and the columns `index`, `question`, `image`, `A`, `B` and, where there are as many,
    `C`, `D` and so on; `hint`; and `answer`, a letter, except in the test split. Images are in the table, in base64; a
    cell of `image` with the index of another row stands for its image. Rows whose index is another's plus 1,000,000, or
    a multiple of that, are the same question with its options in another order: the circular evaluation is over these.
    A question is asked as its hint, the question, and a line "A. ..." for each option.

    Args:
        questions: such as `MMBench_DEV_EN.tsv` or `mmbench_dev_20230712.tsv`, from
            https://github.com/open-compass/MMBench.
    """

    metric: ClassVar[str] = "mmbench"

    def __init__(self, questions: str) -> None:
        super().__init__(questions, images="")  # they are in the table
        self._encoded: dict[str, str] = {}

    def records(self) -> list[Record]:
        rows = read_tsv(self.questions, "MMBench's table")
        lacking = [name for name in ("index", "question", "image", "A", "B") if name not in rows[0][1]]
        if lacking:
            raise DataError(f"{self.questions} is not MMBench's table: its first line lacks {', '.join(lacking)}.")
        ids = [_index(row["index"], where) for where, row in rows]
        groups = Counter(index % ROTATION for index in ids)
        known = set(ids)
        alone = next((index for index in ids if index % ROTATION not in known), None)
        if alone is not None:
            raise DataError(
                f"{self.questions} has a rotation with index {alone}, and no question with index {alone % ROTATION}. "
                "Was the file copied completely?"
            )
        self._encoded = {str(index): row["image"] for index, (_, row) in zip(ids, rows, strict=True)}
        return [
            self._record(index, row, where, groups[index % ROTATION])
            for index, (where, row) in zip(ids, rows, strict=True)
        ]

    def _record(self, index: int, row: Mapping[str, str], where: str, rotations: int) -> Record:
        options = _options(row)
        if len(options) < 2:
            raise DataError(f"{where}: there are {len(options)} options; a question has two at least, in 'A' and 'B'.")
        hint = "" if row.get("hint", "").lower() in _MISSING else row["hint"]
        letters = [chr(ord("A") + number) for number in range(len(options))]
        reference: Rotation | None = None
        if "answer" in row:
            if row["answer"] not in letters:
                raise DataError(f"{where}: 'answer' is {row['answer']!r:.80}; it is one of {', '.join(letters)}.")
            reference = Rotation(index, index % ROTATION, rotations, tuple(options), row["answer"])
        text = with_options(row["question"], options, hint)
        return Record(index, self._image_key(row["image"], str(index), where), text, reference, index % ROTATION)

    def _image_key(self, cell: str, index: str, where: str) -> str:
        """Return the index of the row that holds an image."""
        key = cell if len(cell) <= _LONGEST_INDEX else index
        encoded = self._encoded.get(key, "")
        if len(encoded) <= _LONGEST_INDEX or not _BASE64.fullmatch(encoded) or len(encoded) % 4:
            raise DataError(
                f"{where}: 'image' is {cell!r:.80}; it is an image in base64, or the index of a row that has one. "
                "Get the file anew from its authors."
            )
        return key

    def check_images(self, records: Sequence[Record]) -> None:
        """Do nothing: images are in the table, and `records` has looked at them."""

    def visual(self, record: Record) -> Visual:
        """Return the image of a record, RGB and upright; DataError if it cannot be read."""
        try:
            return Visual(image=image_from(base64.b64decode(self._encoded[record.image], validate=True)))
        except Exception as error:  # damaged files make Pillow's decoders raise OSError, SyntaxError, zlib.error, ...
            raise DataError(
                f"{self.questions}: the image of question {record.question_id}, in the row with index {record.image}, "
                f"cannot be read: {error}. Get the file anew from its authors."
            ) from error


def _index(cell: str, where: str) -> int:
    if not cell.isascii() or not cell.isdigit() or len(cell) > 18:
        raise DataError(f"{where}: 'index' is {cell!r:.80}; it is a whole number of at most 18 digits.")
    return int(cell)


def _options(row: Mapping[str, str]) -> list[str]:
    """Return the options of a row, up to the first letter that has none."""
    options = []
    for number in range(26):
        cell = row.get(chr(ord("A") + number), "")
        if cell.lower() in _MISSING:
            break
        options.append(cell)
    return options
