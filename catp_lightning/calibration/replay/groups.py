"""Groups of samples, named by a field of the user's batch."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catp_lightning.errors import PolicyError, PruningError, did_you_mean


@dataclass(frozen=True)
class Groups:
    """Group of each of B samples.

    Attributes:
        field: name of the batch's field that names the groups.
        keys: int64 [B], checksum of the name of each sample's group.
        names: names of these groups, and maybe of others, by checksum.
    """

    field: str
    keys: Tensor
    names: Mapping[int, str]

    @classmethod
    def of(cls, batch: Any, field: str) -> "Groups":
        """Read the groups from a field of a batch, one value for each sample.

        The batch is a mapping (a dictionary, a `BatchEncoding`) or an object with attributes (a dataclass, a named
        tuple). Values are texts, whole numbers or booleans, in a list, a tensor or an array. Equal texts name one
        group; a number names the group of its digits.

        Raises:
            PolicyError: the batch has no such field, or a value is of another type.
        """
        values = [str(value) for value in _values(batch, field)]
        names = {value: _checksum(value) for value in dict.fromkeys(values)}
        keys = torch.tensor([names[value] for value in values], dtype=torch.int64, device="cpu")
        return cls(field, keys, {key: name for name, key in names.items()})

    def where(self, chosen: Tensor) -> "Groups":
        """Return the groups of the samples where `chosen`, bool [B], is True."""
        return self.each(lambda part: part[chosen])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Groups":
        """Return the groups with `change` applied to their tensor, which has a row for each sample."""
        return Groups(self.field, change(self.keys), self.names)

    def split(self, sizes: Sequence[int]) -> list["Groups"]:
        """Return the groups of the samples of each call of the model, in the order of the calls.

        Raises:
            PruningError: there are not as many values as samples.
        """
        if len(self.keys) != sum(sizes):
            raise PruningError(
                f"group_by is {self.field!r}, of which the batch holds {len(self.keys)} values, but the step asked the "
                f"model about {sum(sizes)} samples, in {len(sizes)} calls. Give one value for each sample that the "
                "model is asked about, in the order in which it is asked."
            )
        return [Groups(self.field, keys, self.names) for keys in self.keys.split(list(sizes))]


def _values(batch: Any, field: str) -> list[str | int]:
    if isinstance(batch, Mapping) and field in batch:
        value = batch[field]
    elif hasattr(batch, field):
        value = getattr(batch, field)
    else:
        fields = [str(name) for name in (batch if isinstance(batch, Mapping) else getattr(batch, "__dict__", ()))]
        raise PolicyError(
            f"group_by is {field!r:.100}, and a batch ({type(batch).__name__}) has no such field"
            f"{': it has ' + ', '.join(map(repr, fields)) if fields else ''}.{did_you_mean(field, fields)} Name one "
            "with a value for each sample, or let the data set or its collate function add one."
        )
    plain = _plain(value)
    values = [plain] if isinstance(plain, str | int) else plain
    if not isinstance(values, list | tuple):
        raise PolicyError(_wrong(field, value))
    values = [_plain(item) for item in values]
    for item in values:
        if not isinstance(item, str | int):
            raise PolicyError(_wrong(field, item))
    return values


def _plain(value: Any) -> Any:
    """Return a tensor or array as a Python number or list."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _wrong(field: str, value: Any) -> str:
    return (
        f"group_by is {field!r:.100}, and this field of a batch holds {value!r:.100} ({type(value).__name__}). It "
        "names the group of each sample by a text, a whole number or a boolean."
    )


def _checksum(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1  # 0 is the group of samples without groups
