"""VLMEvalKit's `run.py` with pruned models: its arguments, and --policy and --keep."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from catp_lightning.callbacks.token_pruning import load_policy
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.integrations.vlmevalkit.model import register
from catp_lightning.safe_text import printable
from catp_lightning.utils.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run VLMEvalKit with the models of `--model` pruned; returns the exit code.

    What is kept is written to `<work dir>/<name of the model>/catp.json`.

    Args:
        arguments: of the command line; None: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m catp_lightning.integrations.vlmevalkit", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--policy", required=True, help="file, folder or address of a policy")
    parser.add_argument("--keep", type=_budget, help="which budget of a folder of policies")
    parser.add_argument("--model", nargs="+", required=True, help="names of models in VLMEvalKit's registry")
    parser.add_argument("--work-dir", default="./outputs", help="VLMEvalKit's folder of results")
    own, others = parser.parse_known_args(arguments)
    from vlmeval.config import supported_VLM

    try:
        made = register(supported_VLM, own.model, load_policy(own.policy, own.keep))
    except (PolicyError, PruningError) as error:
        print(printable(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1
    sys.argv = ["run.py", *others, "--work-dir", own.work_dir, "--model", *made]
    try:
        from vlmeval.run import main as run
    except ImportError:  # in a clone of VLMEvalKit it stands beside the package
        from run import main as run
    run()
    folder = Path(os.environ.get("MMEVAL_ROOT", own.work_dir))
    failed = False
    for name, models in made.items():
        refused = models[-1].figures.refused if models else "see above"
        if refused is not None:
            print(printable(f"{name} was refused: {refused}"), file=sys.stderr)
            failed = True
        else:
            write_json(folder / name / "catp.json", models[-1].figures.compute(), indent=2)
    return int(failed)


def _budget(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


if __name__ == "__main__":
    sys.exit(main())
