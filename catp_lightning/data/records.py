"""Read annotation files as UTF-8, and check what their records hold; errors say where, what, and what is allowed."""

import json
from typing import Any

from catp_lightning.errors import DataError
from catp_lightning.utils.files import read_bytes


def read_text(path: str, holds: str) -> str:
    """Return the text of a file without a byte order mark; line breaks are single line feeds.

    Args:
        path: path of the file.
        holds: what the file should hold, for messages.

    Raises:
        DataError: the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        return _content(path, holds).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: {error}. It should hold {holds}. Was it copied or unpacked completely?"
        ) from error


def read_json(path: str, holds: str) -> Any:
    """Return what a JSON file holds; arguments as for `read_text`.

    Raises:
        DataError: the file is missing, cannot be read, or is not JSON in UTF-8.
    """
    return _parsed(_content(path, holds), f"{path} is not valid JSON", f" It should hold {holds}.")


def read_json_lines(path: str, holds: str) -> list[tuple[str, Any]]:
    """Return what each line of a file of JSON lines holds, and where it stands; empty lines are left out.

    Raises:
        DataError: the file is missing or cannot be read, has no lines, or a line is not JSON.
    """
    lines = enumerate(read_text(path, holds).split("\n"), start=1)
    records = [
        (f"{path}, line {number}", _parsed(line.encode(), f"{path}, line {number} is not valid JSON", ""))
        for number, line in lines
        if line.strip()
    ]
    if not records:
        raise DataError(f"{path} has no lines. It should hold {holds}.")
    return records


def numbered(records: Any, path: str, holds: str) -> list[tuple[str, Any]]:
    """Return the records of a list, and where each stands: its number, counted from 0.

    Raises:
        DataError: it is no list, or it is empty.
    """
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} does not hold {holds}: that is a list that is not empty, got {records!r:.80}.")
    return [(f"{path}, record number {number}", record) for number, record in enumerate(records)]


def data_of(path: str, layout: str) -> list[tuple[str, Any]]:
    """Return the records in the list "data" of a JSON object, and where each stands, as `numbered` does.

    Args:
        path: path of the file.
        layout: whose layout it should have, "TextVQA's" for example.

    Raises:
        DataError: the file cannot be read, is not JSON, or has no such list, or an empty one.
    """
    content = read_json(path, f"{layout} questions")
    listed = content.get("data") if isinstance(content, dict) else None
    return numbered(listed, path, f"an object with a list 'data' of {layout} questions")


def field(record: Any, name: str, kind: type, where: str, layout: str) -> Any:
    """Return a value of a record.

    Args:
        record: what should be an object with a value under `name`.
        name: name of the value.
        kind: type of the value: int, str, list, dict or bool.
        where: file and place of the record, for messages.
        layout: whose layout it should have, for messages.

    Raises:
        DataError: there is no such value, it is of another type, a number is not of 64 bits, or a text has halves of
            characters.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DataError(f"{where} is not in {layout} layout: {name!r} must be {kind.__name__}, got {value!r:.80}.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DataError(f"{where}: {name!r} is {value!r:.80}; an id is a whole number of 64 bits.")
    if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise DataError(f"{where}: {name!r} is {value!r:.80}, which is not text: half a character is missing.")
    return value


def _content(path: str, holds: str) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file. It should hold {holds}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. It should hold {holds}.") from error


def _parsed(content: bytes, wrong: str, hint: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{wrong}: {error}.{hint} Was it copied or unpacked completely?") from error
