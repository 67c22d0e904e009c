"""The models of VLMEvalKit's registry, pruned by a policy."""

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from types import new_class
from typing import Any, ClassVar

from torch import nn

from catp_lightning.errors import PruningError, did_you_mean
from catp_lightning.integrations.lmms_eval.figures import Figures, counted
from catp_lightning.models import find_family
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning.pruner import applied


class Pruned:
    """Methods that put a VLMEvalKit model's own into a `prune` context.

    Attributes:
        policy: the policy that prunes it.
        figures: what is counted in all of its calls.
    """

    policy: ClassVar[PruningPolicy]
    figures: Figures
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(getattr(self, "model", None), nn.Module):
            raise PruningError(
                f"VLMEvalKit's {type(self).__mro__[2].__name__} holds no model of transformers as `model`, so there is "
                "nothing to prune. Choose another model of its registry."
            )
        with applied(self.model, self.policy):
            pass  # refused now, not at the first question
        self.figures = Figures(find_family(self.model), self.policy)

    def generate(self, message: Any, dataset: Any = None) -> Any:
        own: Any = super()
        with counted(self.model, self.policy, self.figures):
            return own.generate(message, dataset)

    def chat(self, messages: Any, dataset: Any = None) -> Any:
        own: Any = super()
        with counted(self.model, self.policy, self.figures):
            return own.chat(messages, dataset)


def pruned(kind: type[Any], policy: PruningPolicy) -> type[Any]:
    """Return a VLMEvalKit model class whose questions are answered pruned; all else is that of `kind`."""
    own = {"__module__": kind.__module__, "policy": policy}
    return new_class(f"{kind.__name__}Pruned", (Pruned, kind), {}, lambda attributes: attributes.update(own))


def register(registry: MutableMapping[str, Any], names: Sequence[str], policy: PruningPolicy) -> dict[str, list[Any]]:
    """Add pruned models to a registry, each beside the one that it is of.

    Their names end in the policy's digest: VLMEvalKit keeps and reuses predictions by the name of the model.

    Args:
        registry: `vlmeval.config.supported_VLM`.
        names: names of models in it.
        policy: prunes them.

    Returns:
        The new names, each with a list of the models that VLMEvalKit makes of it later; more than one after an error.

    Raises:
        PruningError: a name is not in the registry, or is that of a model behind an API.
    """
    added: dict[str, list[Any]] = {}
    for name in names:
        entry = registry.get(name)
        if not isinstance(entry, partial):
            raise PruningError(f"VLMEvalKit has no model {name!r:.200}.{did_you_mean(name, registry)}")
        if not isinstance(entry.func, type) or getattr(entry.func, "is_api", False):
            raise PruningError(f"VLMEvalKit's {name!r:.200} is answered elsewhere, by an API: nothing can be pruned.")
        own = f"{name}-catp-{policy.digest[:12]}"
        added[own] = []
        registry[own] = partial(_making(pruned(entry.func, policy), added[own]), *entry.args, **entry.keywords)
    return added


def _making(kind: type[Any], made: list[Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        made.append(kind(*args, **kwargs))
        return made[-1]

    return make
