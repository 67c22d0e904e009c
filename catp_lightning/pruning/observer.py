"""Collection, in one forward of the vision part, of the signals that scorers and selectors need."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import BY_LAYER, Needs, Observation, Signal
from catp_lightning.models import Family
from catp_lightning.prompt.attention import Reduction, observe_attention
from catp_lightning.prompt.call import CallTracker
from catp_lightning.prompt.prompt import DecoderPrompt, Prompt
from catp_lightning.utils.hooks import hooked
from catp_lightning.utils.on_cpu import on_cpu

ATTENTION = frozenset(
    {
        Signal.CROSS_ATTENTION,
        Signal.SELF_ATTENTION,
        Signal.VISION_ATTENTION,
        Signal.VISION_KEYS,
        Signal.VISION_ATTENTION_RECEIVED,
    }
)

Key = Signal | tuple[Signal, int]
Looks = list[tuple[Reduction, Callable[[Tensor], None]]]


class Observer:
    """Observer of one model's vision part, which stores what its forward shows in the running call.

    Args:
        family: the model's family.
        needs: the signals to observe.
        calls: tracker of the model's calls.

    Raises:
        PruningError: a signal or a layer is asked for that the model does not have.
    """

    def __init__(self, family: Family, needs: Needs, calls: CallTracker) -> None:
        self.family, self.calls = family, calls
        self.active = True
        self.sites = list(_sites(family, needs))
        self.at_entry = family.at_entry & needs.keys()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the model while inside; attention is observed and hooks are in place only there."""
        attention: dict[PreTrainedModel, dict[nn.Module, Looks]] = {}
        keys: dict[PreTrainedModel, list[Key]] = {}
        with ExitStack() as undo:
            for signal, layer in self.sites:
                key = (signal, layer) if signal in BY_LAYER else signal
                if signal in ATTENTION:
                    for site in self.family.attention_sites(signal, layer):
                        looks = attention.setdefault(site.owner, {}).setdefault(site.module, [])
                        looks.append((site.reduction, self._storing(key)))
                        keys.setdefault(site.owner, []).append(key)
                else:
                    output = self.family.output_site(signal)
                    undo.enter_context(hooked(output.module, after=self._reading(key, output.read)))
            for owner, modules in attention.items():
                undo.enter_context(hooked(owner, before=self._beginning(keys[owner])))
                undo.enter_context(observe_attention(owner, {module: _all(x) for module, x in modules.items()}))
            yield

    def take(self, prompt: Prompt) -> Observation:
        """Return the signals of the prompt, and of the vision part as it last ran in the prompt's call.

        In `generate` without a cache images are seen once, and every step gets the signals of that time.

        Raises:
            PruningError: the vision part was not run in this call.
        """
        shown = prompt.arguments.signals
        if len(shown) < len(self.sites) or not all(run for runs in shown.values() for run in runs):
            raise PruningError(
                "The language model was called without the vision part being run in the same call, so its tokens "
                "cannot be scored. Pass pixel_values, not precomputed image features; or use keep=1.0."
            )
        values = {key: [_joined(run) for run in runs] for key, runs in shown.items()}
        seen = self.family.observation(values, self.at_entry, prompt)
        if self.family.reads == "decoder" and isinstance(prompt, DecoderPrompt):
            endings, tokens = on_cpu(prompt.endings, prompt.tokens)
            seen = seen.protecting(endings[tokens])
        return seen

    def _beginning(self, keys: list[Key]) -> Callable[..., None]:
        """Return a hook for the beginning of a forward: what its attention shows belongs together.

        Towers that read pictures of several sizes call attention once for each picture, frame or window.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for key in keys if self.active else ():
                runs = self.calls.user_call.signals.setdefault(key, [])
                runs.append([])
                del runs[:-2]  # of images and of videos; every step of `generate` without a cache runs them again

        return hook

    def _storing(self, key: Key) -> Callable[[Tensor], None]:
        def store(value: Tensor) -> None:
            if self.active and (runs := self.calls.user_call.signals.get(key)):  # none: checkpointing runs parts again
                runs[-1].append(value)

        return store

    def _reading(self, key: Key, read: Callable[..., Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.active:
                self.calls.user_call.signals[key] = [[read(args, kwargs, output).detach()]]

        return hook


def _joined(run: list[Tensor]) -> Tensor:
    """Return what the attention calls of one forward showed, [P, D, N] each, side by side."""
    return run[0] if len(run) == 1 else torch.cat(run, -1)


def _all(looks: Looks) -> tuple[Callable[..., Any], Callable[[Any], None]]:
    """Combine several (reduction, store) pairs for one module's attention into one."""

    def store(values: list[Tensor]) -> None:
        for (_, storing), value in zip(looks, values, strict=True):
            storing(value)

    return lambda *attention: [reduction(*attention) for reduction, _ in looks], store


def _sites(family: Family, needs: Needs) -> Iterator[tuple[Signal, int]]:
    counts = family.layers()
    there = family.signals | counts.keys()
    for signal, layers in needs.items():
        if signal not in there:
            raise PruningError(f"The policy reads {_named(signal)}, which {type(family.model).__name__} does not show.")
        if signal in family.at_entry:
            continue
        if signal not in BY_LAYER:
            yield signal, 0
            continue
        count = counts[signal]
        for layer in range(count) if layers is None else layers:
            if not -count <= layer < count:
                raise PruningError(
                    f"The policy reads layer {layer} of {_named(signal)}; this model has "
                    f"{count}, numbered 0 to {count - 1}. Calibrate again, or name layers it has."
                )
        yield from ((signal, layer) for layer in sorted({n % count for n in (layers or range(count))}))


def _named(signal: Signal) -> str:
    return signal.name.lower().replace("_", "-")
