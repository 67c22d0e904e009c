"""Changes to the files of a VQA split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catp_lightning.data.vqa import VQASplit


def questions_of(split: VQASplit) -> list[dict]:
    return json.loads(Path(split.questions).read_text())["questions"]


def rewrite(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Damage to one of a split's JSON files: what `change` makes of its content is written back."""

    def damage(folder: Path) -> None:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def edit(name: str, change: Callable[[list], Any]) -> Callable[[Path], None]:
    """The same, where `change` changes the list of records in place."""

    def in_place(content: dict) -> dict:
        change(content[name])
        return content

    return rewrite(name, in_place)
