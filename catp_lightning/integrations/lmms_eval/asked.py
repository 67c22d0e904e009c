"""Which policy the arguments of lmms-eval's `--model_args` ask for."""

from pathlib import Path

from catp_lightning.callbacks.token_pruning import load_policy
from catp_lightning.errors import PolicyError
from catp_lightning.policy import PruningPolicy


def asked_policy(policy: str | Path | None, keep: int | float | None) -> PruningPolicy:
    """Return the policy that `policy=` and `keep=` ask for.

    Args:
        policy: file, folder or address of a policy; None: not given, which only `keep` 1.0 allows.
        keep: which budget of a folder; of one policy its own. 1.0 prunes nothing, and no policy is read.

    Raises:
        PolicyError: no policy is given, none can be read, or there is none for the budget.
    """
    if isinstance(keep, float) and keep == 1.0:
        return PruningPolicy(keep=1.0)
    if policy is None:
        raise PolicyError(
            "--model_args has no policy=: give policy=<file>. The unpruned model is run by its own name in lmms-eval "
            "(--model llava_hf), or with keep=1.0."
        )
    return load_policy(policy, keep)
