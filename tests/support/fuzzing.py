"""Damaged inputs, the same on every machine, made by a seed from real bytes or from a real JSON document."""

import io
import json
import os
import pickle
import random
import resource
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import zeros

NUMBERS = [
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-0",
    "1e-999",
    "0.1e1",
    str(10**400),
    "9" * 5000,
    "-9223372036854775809",
]
"""Numbers as JSON text, most of which Python's reader takes."""
STRINGS = [
    "", " ", "\x00", "\ud800", "\u202e", "catp\x00", "x" * 100_000, "../../../etc/passwd", "/dev/zero", "~nobody/x",
    "wandb", "__proto__", "__class__", "__init__", "constructor", "{}", "{image_id}", "%s%s%n", "${PATH}", "-1", "NaN",
    "!!python/object/apply:os.mkdir [canary]", "__import__('os').mkdir('canary')", "<image>", "\ufeff", "é" * 50,
]  # fmt: skip
"""Strings to which some program gives a special meaning."""
KEYS = ["__proto__", "__class__", "__dict__", "self", "cls", "", "\x00", "keep", "scorer", "question_id", "answers"]


class Runs:
    """Object that makes the folder `canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


class Mutator:
    """Random damage to documents and bytes.

    Args:
        seed: seed of all random choices.
        canary: a folder that does not exist; a reader that runs code from a file makes it.
    """

    def __init__(self, seed: int, canary: Path) -> None:
        self.random = random.Random(seed)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("policy.json", "{}")
        self._other = [
            *(pickle.dumps(Runs(canary), protocol) for protocol in (0, 2, 5)),
            packed.getvalue(),
            save({"x": zeros(2)}),
            b"\x89PNG\r\n\x1a\n",
            f"__import__('os').mkdir({str(canary)!r})".encode(),
            f"!!python/object/apply:os.mkdir [{canary}]".encode(),
            b"", b"\x00", b"null", b"[]", b"{}", b'"text"', b"1", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 3000,
            b'{"a":' * 3000,
        ]  # fmt: skip

    def document(self, document: Any) -> bytes:
        """Return a document as JSON, with some of its nodes changed and at times some bytes as well."""
        found = json.loads(json.dumps(document))
        marks: dict[str, str] = {}
        for _ in range(self.random.choice((1, 1, 2, 3))):
            found = self._changed(found, marks)
        text = json.dumps(found, ensure_ascii=self.random.random() < 0.9)
        for mark, raw in marks.items():
            text = text.replace(f'"{mark}"', raw)
        content = text.encode("utf-8", "surrogatepass")
        return self.bytes(content) if self.random.random() < 0.1 else content

    def bytes(self, content: bytes) -> bytes:
        """Return bytes with bits flipped, pieces removed, repeated or inserted; or something else altogether."""
        draw, found = self.random, bytearray(content)
        if draw.random() < 0.03 or not found:
            return draw.choice(self._other)
        for _ in range(draw.choice((1, 1, 2, 5))):
            place = draw.randrange(len(found) + 1)
            end = min(len(found), place + draw.choice((1, 2, 8, 64)))
            kind = draw.randrange(7)
            if kind == 0 and place < len(found):
                found[place] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del found[place:]
            elif kind == 2:
                del found[place:end]
            elif kind == 3:
                found[place:place] = draw.randbytes(draw.choice((1, 4, 32)))
            elif kind == 4:
                found[place:place] = found[place:end] * draw.choice((1, 3))
            elif kind == 5:
                found[place:place] = draw.choice(NUMBERS).encode()
            else:
                found[place:place] = draw.choice(
                    (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"{", b"]", b",")
                )
        return bytes(found)

    def _changed(self, document: Any, marks: dict[str, str]) -> Any:
        """Change one node of a document; `marks` gets the raw text of marks, which JSON's writer would not write."""
        places = list(_places(document))
        if not places:
            return self._value(marks)
        parent, key = self.random.choice(places)
        kind = self.random.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = [parent[key]] if self.random.random() < 0.5 else {"x": parent[key]}
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, json.loads(json.dumps(parent[key])))
        elif kind == 3 and isinstance(parent, dict):
            parent[self.random.choice(KEYS)] = parent.pop(key)
        elif kind == 4:
            other, place = self.random.choice(places)
            parent[key] = json.loads(json.dumps(other[place]))
        elif kind == 5 and isinstance(parent, dict):  # a key twice
            marks[mark := f"@{len(marks)}"] = f"0, {json.dumps(key)}: {self.random.choice(NUMBERS)}"
            parent[key] = mark
        else:
            parent[key] = self._value(marks)
        return document

    def _value(self, marks: dict[str, str]) -> Any:
        draw = self.random
        kind = draw.randrange(6)
        if kind == 0:
            marks[mark := f"@{len(marks)}"] = draw.choice(NUMBERS)
            return mark
        if kind == 1:
            return draw.choice(STRINGS)
        if kind == 2:
            nested: Any = draw.choice((1, "x", None))
            for _ in range(draw.choice((3, 40, 70, 400))):
                nested = [nested] if draw.random() < 0.5 else {"x": nested}
            return nested
        if kind == 3:
            return draw.choice((None, True, False, [], {}, [None], {"": None}))
        if kind == 4:
            return draw.choice((0, -1, 1, 2**31, 2**63, 2**64, 0.0, -0.5, 1.0, 1e-300, 1e308, 0.1))
        return [draw.choice((0, 1.5, "x", None, True)) for _ in range(draw.choice((1, 3, 100)))]


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Return the place of every node: its parent and its key there."""
    found: list[tuple[Any, Any]] = []
    left = [document]
    while left:
        parent = left.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else []
        for key in keys:
            found.append((parent, key))
            left.append(parent[key])
    return found


def many(count: int, each: Callable[[int], bool]) -> int:
    """Run `each` on seeds; how many of them it took. None may take seconds, nor memory that is not given back."""
    before, taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The policy (has keys|has format_version|was made for)|.* says more than once"
        )
        for seed in range(count):
            start = time.process_time()
            taken += each(seed)
            spent = time.process_time() - start
            assert spent < 2, f"seed {seed} took {spent:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MiB"
    return taken
