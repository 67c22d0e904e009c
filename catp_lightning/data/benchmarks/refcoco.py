"""RefCOCO and its like: the box of what an expression refers to."""

import math
from typing import Any, ClassVar

from catp_lightning.data.benchmarks.reader import Reader, Record, file_name
from catp_lightning.data.benchmarks.references import Box
from catp_lightning.data.records import field, read_json_lines
from catp_lightning.errors import DataError


class RefCOCO(Reader):
    """RefCOCO, RefCOCO+ and RefCOCOg (arXiv 1608.00272), expressions for objects, to be answered by the object's box.

    The file has a JSON object a line, with `image`, `sent` (the expression), `bbox` (left, top, right and bottom in
    pixels), `width` and `height` of the image, as the files of Qwen-VL's evaluation have. The authors' own files,
    `refs(unc).p`, are pickles, which can run programs: they are not read. Lines have no ids; their number is taken,
    from 0.

    Args:
        questions: such as `refcoco_testA.jsonl`.
        images: the folder that paths in the file start from.
        scale: number that stands for the whole width and height in the model's answers, such as 1, 999 or 1000; None:
            answers are in pixels of the image file.

    Raises:
        ValueError: `scale` is not above 0.
    """

    metric: ClassVar[str] = "refcoco"

    def __init__(self, questions: str, images: str, scale: float | None = None) -> None:
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; it is a number above 0, such as 1000, or None for pixels.")
        super().__init__(questions, images)
        self.scale = scale

    def records(self) -> list[Record]:
        lines = read_json_lines(self.questions, "an expression of RefCOCO a line")
        return [self._record(line, where, number) for number, (where, line) in enumerate(lines)]

    def _record(self, line: object, where: str, number: int) -> Record:
        image, text = (field(line, name, str, where, "RefCOCO's") for name in ("image", "sent"))
        width, height = (field(line, name, int, where, "RefCOCO's") for name in ("width", "height"))
        box = field(line, "bbox", list, where, "RefCOCO's")
        if len(box) != 4 or not all(map(_is_number, box)) or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise DataError(f"{where}: 'bbox' is {box!r:.80}; it is left, top, right and bottom in pixels.")
        if width < 1 or height < 1:
            raise DataError(f"{where}: the image is {width} x {height} pixels; both are at least 1.")
        units = (width / self.scale, height / self.scale) if self.scale else (1.0, 1.0)
        return Record(number, file_name(image, where), text, Box(*map(float, box), *units), number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
