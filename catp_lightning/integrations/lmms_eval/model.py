"""The models of lmms-eval, pruned by a policy."""

from collections.abc import Callable, Mapping, Sequence
from types import new_class
from typing import Any, ClassVar

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from torch import nn

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.integrations.lmms_eval.asked import asked_policy
from catp_lightning.integrations.lmms_eval.backends import backend_of
from catp_lightning.integrations.lmms_eval.figures import counted
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning.pruner import applied
from catp_lightning.safe_text import one_line

Answer = Callable[[list[Any]], list[Any]]
"""A method of an lmms-eval model that takes requests and returns what it answers to each."""


class Pruned:
    """Methods that put an lmms-eval model's own into a `prune` context.

    Attributes:
        policy: the policy that prunes it.
        backend: name by which lmms-eval knows the model.
    """

    policy: ClassVar[PruningPolicy]
    backend: ClassVar[str]
    model: Any
    is_simple: bool
    _inside = False

    def generate_until(self, requests: list[Any]) -> list[Any]:
        own: Any = super()
        return self._answer(own.generate_until, requests)

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        own: Any = super()
        return self._answer(own.generate_until_multi_round, requests)

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        own: Any = super()
        return self._answer(own.loglikelihood, requests)

    def _answer(self, answer: Answer, requests: list[Any]) -> list[Any]:
        """Answer requests pruned, and add the figures of this process to lmms-eval's."""
        if self._inside:  # one of these methods calls another
            return answer(requests)
        if not self.is_simple:
            ask_as(self.backend, requests)
        self._inside = True
        try:
            with counted(self.model, self.policy) as figures:
                answers = answer(requests)
        finally:
            self._inside = False
        found = figures.compute()
        if not found:
            logger.warning(f"catp pruned nothing in {len(requests)} requests: the model was given no image.")
        elif figures.overlap is not None and (told := figures.overlap.message()) is not None:
            logger.warning(one_line(told))
        log_metrics(0.0, 0, 0.0, {**found, "catp/policy": self.policy.digest})
        return answers


def pruned(kind: type[Any], policy: PruningPolicy, backend: str) -> type[Any]:
    """Return an lmms-eval model class whose requests are answered pruned; all else is that of `kind`.

    Its name says so, with the policy's digest: lmms-eval writes the name of the class into its results.

    Args:
        kind: class of an lmms-eval model that holds a Hugging Face model as `model`.
        policy: the policy.
        backend: name by which lmms-eval knows `kind`; some tasks have prompts of their own for some names.
    """
    own = {"__module__": kind.__module__, "policy": policy, "backend": backend}
    name = f"{kind.__name__} pruned by policy {policy.digest}"
    return new_class(name, (Pruned, kind), {}, lambda attributes: attributes.update(own))


def ask_as(backend: str, requests: Sequence[Any]) -> None:
    """Let tasks ask as they ask the model `backend`: lmms-eval told them that its name is catp.

    Messages of chat models are made from the task when a request is answered, so it is not too late.
    """
    tasks = {id(task): task for request in requests if (task := getattr(request.args[1], "__self__", None)) is not None}
    for task in tasks.values():
        texts = task.config.lmms_eval_specific_kwargs
        if isinstance(texts, dict) and backend in texts:
            task.lmms_eval_specific_kwargs = texts[backend]


def made(
    arguments: Mapping[str, Any], backend: str | None = None, policy: PruningPolicy | None = None, simple: bool = False
) -> tuple[Any, str]:
    """Make the model that lmms-eval runs for a folder or repository.

    Args:
        arguments: arguments of the model's class, `pretrained` among them.
        backend: name of the lmms-eval model; None: that of the model's type.
        policy: prunes it; None: it runs as ever.
        simple: True for what lmms-eval takes with `--force_simple`.

    Returns:
        The lmms-eval model, and the name of it.

    Raises:
        PruningError: it holds no model of transformers.
    """
    if backend is None:
        options = {name: arguments[name] for name in ("revision", "trust_remote_code") if name in arguments}
        backend = backend_of(arguments["pretrained"], **options)
    kind = get_model(backend, force_simple=simple)
    found = (kind if policy is None else pruned(kind, policy, backend))(**arguments)
    if not isinstance(getattr(found, "model", None), nn.Module):
        raise PruningError(
            f"lmms-eval's {backend!r:.200} holds no model of transformers as `model`, so there is nothing to prune. "
            "Name another with backend=, huggingface for example."
        )
    return found, backend


class Catp(lmms):
    """What `--model catp` stands for: makes the model that lmms-eval itself would run, pruned.

    `--model_args` takes the arguments of that model, and:

    - policy: file, folder or address of a policy, as for `PruningPolicy.load`.
    - keep: which budget of a folder of several; 1.0 prunes nothing, and needs no policy.
    - backend: name of the lmms-eval model, where another than that of the model's type is wanted.

    Raises:
        PolicyError: no model or policy is given, or no policy can be read; it is for another budget or model.
        PruningError: the model cannot be pruned.
    """

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        given = simple_parse_args_string(arg_string)
        policy, keep, backend = (given.pop(name, None) for name in ("policy", "keep", "backend"))
        if given.get("pretrained") is None:
            raise PolicyError("--model_args has no pretrained=: give pretrained=<model>,policy=<file>.")
        own = asked_policy(policy, keep)
        given |= {name: value for name, value in (additional_config or {}).items() if value is not None}
        found, _ = made(given, backend, own, cls.is_simple)
        with applied(found.model, own):
            pass  # refused now, not after the data are read
        return found


class SimpleCatp(Catp):
    """The same with `--force_simple`."""

    is_simple = True
