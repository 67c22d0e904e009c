"""Policies as repositories of the Hugging Face hub: a folder with the policy and a model card, and its upload."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from catp_lightning.errors import PolicyError
from catp_lightning.safe_text import Markdown, markdown_text, printable
from catp_lightning.utils.files import write_text
from catp_lightning.utils.markdown import markdown_table

LIBRARY, CARD = "catp-lightning", "README.md"
LISTED = 10
"""Number of candidates that a card lists."""


def save_card(policy: Any, folder: Path, repository: str, license: str | None) -> Path:
    """Write the model card of a `PruningPolicy` into a folder, atomically, and return the file's path."""
    return write_text(folder / CARD, card(policy, repository, license))


def push(policy: Any, repository: str, license: str | None, private: bool | None, **commit: Any) -> str:
    """Upload a `PruningPolicy` with its card in one commit, creating the repository if there is none.

    Args:
        policy: the policy.
        repository: "user/name", or "name" for a repository of the user who is logged in.
        license: licence of the policy, an identifier of the hub.
        private: whether a repository that is created is private; None: what the user or organisation has set.
        commit: arguments of `HfApi.upload_folder`: token, revision, commit_message, create_pr.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        PolicyError: the hub refused, or could not be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=commit.pop("token", None), library_name=LIBRARY)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            policy.save_pretrained(folder, repository=made.repo_id, license=license)
            done = api.upload_folder(repo_id=made.repo_id, folder_path=folder, **commit)
        return str(done.pr_url or done.commit_url)
    except Exception as error:  # of the network, of the hub and of the login: many types
        raise PolicyError(
            f"The policy could not be uploaded to {repository!r:.200} on the Hugging Face hub: {error}. Check the "
            "name, the network and your token (`hf auth login`, with write access)."
        ) from error


def card(policy: Any, repository: str, license: str | None) -> str:
    """Return the model card of a `PruningPolicy`: Markdown, after metadata by which the hub lists it.

    Args:
        policy: the policy.
        repository: its address on the hub, "user/name".
        license: licence of the policy, or None.
    """
    from huggingface_hub import ModelCardData

    model, evidence = policy.model or {}, policy.evidence
    base = str(model.get("name", ""))
    data = ModelCardData(
        library_name=LIBRARY,
        license=license,
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,  # others are no address of the hub
        tags=["visual-token-pruning", "vision-language-model", policy.scorer],
        pipeline_tag="image-text-to-text",
    )
    where = markdown_text(base or model.get("type", "any supported model"))
    lines = [
        f"# {markdown_text(repository.rpartition('/')[2])}",
        f"A policy for {where}: which of its visual tokens the language model reads. It holds no weights.",
        *("- " + line for line in _what(policy)),
        "## Use",
        f"```python\n{_use(policy, printable(repository))}\n```",
        "## What was measured",
        *_measured(evidence),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def _what(policy: Any) -> list[Markdown]:
    """Return a line for the model's shape and for each stage."""
    shape = {name: value for name, value in (policy.model or {}).items() if name not in ("name", "type")}
    parts = ", ".join(f"{value} {name}" for name, value in shape.items())
    found = [f"Model: {policy.model.get('type')} with {parts}."] if shape else []
    for stage in policy.stages:
        kept = f"{stage.keep} tokens" if isinstance(stage.keep, int) else f"{stage.keep:g} of all tokens"
        found.append(f"Method: {stage.scorer}{(stage.selector and f' with {stage.selector}') or ''}, keeps {kept}.")
    if policy.routes is not None:
        found.append(f"The question chooses between this and {len(policy.routes['rules'])} other rules.")
    if policy.budget is not None:
        found += [
            f"Chosen for a price: {share:g} of the unpruned model's {unit}." for unit, share in policy.budget.items()
        ]
    return [markdown_text(line) for line in found]


def _use(policy: Any, repository: str) -> str:
    return f'''from lightning.pytorch import Trainer
from catp_lightning import TokenPruning

trainer = Trainer(callbacks=[TokenPruning("hf://{repository}")])
trainer.predict(module, loader)  # your LightningModule, which holds the model

# or without Lightning
from catp_lightning import PruningPolicy, prune

with prune(model, PruningPolicy.from_pretrained("{repository}")):
    model.generate(**inputs)'''


def _measured(evidence: Mapping[str, Any]) -> list[str]:
    """Return paragraphs about what a calibration found."""
    if not evidence.get("retention"):
        return ["Nothing: this policy was written by hand, or its evidence was left out."]
    try:
        return _found(evidence)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # a file may hold anything
        return ["The policy's evidence is not of the form that a calibration of this version writes."]


def _found(evidence: Mapping[str, Any]) -> list[str]:
    samples = evidence["samples"]
    hashes = str(evidence.get("images", {}).get("hashes", ""))
    found = [
        f"Agreement is the share of answers that are those of the unpruned model, with a 95% interval, on "
        f"{samples['check']:d} samples that the choice was not made on; it was made on {samples['learn']:d}. It holds "
        "for data like those of the calibration."
    ]
    rows = []
    for point in evidence["retention"]:
        best = point.get("best_control")
        against = f"{best['agreement']:.3f}, {best['name']}; {best['verdict']}" if best else "none"
        budget = f"{point['keep']} ({point['tokens']} tokens)"
        rows.append([budget, point["chosen"], _with_interval(point), against])
    found.append(markdown_table(["budget", "chosen", "agreement", "best control"], rows))
    checked = [row for row in evidence.get("candidates", ()) if row.get("check")]
    checked = sorted(checked, key=lambda row: -row["check"]["agreement"])[:LISTED]
    if checked:
        found.append(f"The {len(checked)} best candidates of the last round:")
        table = [[row["name"], "control" if row["control"] else "", _with_interval(row["check"])] for row in checked]
        found.append(markdown_table(["candidate", "", "agreement"], table))
    if hashes:
        digest = hashlib.sha256(hashes.encode()).hexdigest()
        found.append(f"Digest of the calibration images: `{digest}`.")
    return found


def _with_interval(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{figures['agreement']:.3f} ({low:.3f} to {high:.3f})"
