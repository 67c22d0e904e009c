"""Run files of W&B, read back with wandb's own protobufs."""

import json
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(file: Path) -> Iterator[Any]:
    """The records of a run file: LevelDB's log format, chunks of at most a block."""
    from wandb.proto import wandb_internal_pb2

    content, offset, whole = file.read_bytes(), 7, b""
    while offset + HEADER <= len(content):
        if BLOCK - offset % BLOCK < HEADER:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + HEADER])
        if offset + HEADER + length > len(content):
            return  # not written yet
        whole += content[offset + HEADER : offset + HEADER + length]
        offset += HEADER + length
        if kind in (1, 4):  # the only or the last chunk of a record
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def complete(file: Path) -> list[Any]:
    """All records: `wandb.finish` may return before its service has written the last of them."""
    for _ in range(100):
        found = list(records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} never ends")


def history_of(found: Iterable[Any]) -> list[dict[str, Any]]:
    """What each step of a run logged, by name; names with dots and slashes stay whole."""
    steps = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            step: dict[str, Any] = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                place = step
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            steps.append(step)
    return steps
