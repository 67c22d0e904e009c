"""What a policy is saved to and loaded from: files, folders, Weights & Biases, the Hugging Face hub."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from catp_lightning.errors import PolicyError
from catp_lightning.policy.budgets import check_keep, check_price
from catp_lightning.policy.frozen import LARGEST
from catp_lightning.policy.hub import push, save_card
from catp_lightning.policy.locations import HUB, POLICY, find, policy_file
from catp_lightning.utils.files import write_text


class Stored(ABC):
    """Base class of `PruningPolicy`: saving and loading."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the policy with the fields that `to_dict` gave."""

    def save(self, path: str | Path) -> Path:
        """Write the policy as JSON, atomically, and return the file's path.

        Args:
            path: a file; a path without a suffix is a folder, which gets `policy.json`.
        """
        return write_text(policy_file(Path(path)), self._text())

    @property
    def digest(self) -> str:
        """SHA-256 of the file that `save` writes, as 64 hex digits: `sha256sum policy.json` prints it."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def _text(self) -> str:
        values = self.to_dict()
        text = json.dumps(values, indent=2, allow_nan=False)
        if len(text) >= LARGEST:  # with indentation it would be too large to load
            text = json.dumps(values, allow_nan=False)
        return text + "\n"

    @classmethod
    def load(
        cls, path: str | Path, keep: int | float | None = None, *, budget: Mapping[str, float] | None = None
    ) -> Self:
        """Load a policy from a file, a folder, Weights & Biases or the Hugging Face hub.

        Args:
            path: a file; a folder with `policy.json` or a file for each budget, as a calibration saves them;
                "wandb://entity/project/name:alias" for an artifact; "hf://user/repo" for a repository of the hub,
                "hf://user/repo@revision" for a branch, tag or commit of it.
            keep: the budget to take from a folder that holds several; a single policy must be for this budget.
            budget: the price to pay at most, a share of what the unpruned model pays, {"cache_bytes": 0.25}: of the
                policies that a calibration at prices saved, the one that agreed most with the unpruned model, of those
                that cost no more. The unit may be another than the one that it was calibrated for.

        Raises:
            PolicyError: there is no such file, it is damaged, not a regular file or larger than 4 MiB, or only other
                budgets are there, or several are there and none is named.
        """
        if keep is not None:
            check_keep(keep)
        file, values = find(path, keep, None if budget is None else check_price(budget))
        try:
            return cls.from_dict(values)
        except PolicyError as error:
            raise PolicyError(f"{file}: {error}") from error

    def save_pretrained(self, folder: str | Path, *, repository: str | None = None, license: str | None = None) -> Path:
        """Write the policy and a model card, `policy.json` and `README.md`, into a folder, and return its path.

        The card says what the policy is for and how to use it, and lists what its calibration measured, with intervals.

        Args:
            folder: the folder, which is made if there is none.
            repository: where the folder will be on the hub, "user/name", which the card's examples load; None: the
                folder's name.
            license: licence of the policy, an identifier of the hub, "apache-2.0" for example; None: the card names
                none.
        """
        folder = Path(folder)
        self.save(folder / POLICY)
        save_card(self, folder, folder.name if repository is None else repository, license)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        repository: str | Path,
        revision: str | None = None,
        *,
        keep: int | float | None = None,
        budget: Mapping[str, float] | None = None,
    ) -> Self:
        """Load a policy from a repository of the Hugging Face hub, or from a folder of `save_pretrained`.

        Args:
            repository: "user/name", or a folder.
            revision: branch, tag or commit of the repository; None: its main branch.
            keep, budget: as in `load`.

        Raises:
            PolicyError: as in `load`; or a folder was named with a revision.
        """
        if Path(repository).is_dir():
            if revision is not None:
                raise PolicyError(
                    f"revision is {revision!r:.200} and {str(repository)!r:.200} is a folder: it has none."
                )
            return cls.load(repository, keep, budget=budget)
        return cls.load(f"{HUB}{repository}{'' if revision is None else f'@{revision}'}", keep, budget=budget)

    def push_to_hub(
        self,
        repository: str,
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a pruning policy",
        create_pr: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the policy with its model card to the Hugging Face hub, where it is found by the model it is for.

        Args:
            repository: "user/name", or "name" for a repository of the user who is logged in; made if there is none.
            license: licence of the policy, an identifier of the hub, "apache-2.0" for example; None: the card names
                none.
            private: whether a repository that is made is private; None: what its owner has set.
            revision: branch to commit to; None: the main branch.
            commit_message: message of the commit.
            create_pr: True to open a pull request instead of a commit.
            token: token with write access; None: that of `hf auth login` or of HF_TOKEN.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            PolicyError: the hub refused, or could not be reached.

        Example::

            PruningPolicy.load("policy.json").push_to_hub("user/llava-1.5-7b-catp-25", license="apache-2.0")
            PruningPolicy.from_pretrained("user/llava-1.5-7b-catp-25")
        """
        commit = {"revision": revision, "commit_message": commit_message, "create_pr": create_pr, "token": token}
        return push(self, repository, license, private, **commit)
