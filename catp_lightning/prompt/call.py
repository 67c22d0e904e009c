"""Arguments of a model's running calls, captured before the model's own code turns them into something else."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from catp_lightning.errors import PruningError
from catp_lightning.utils.hooks import Seen, hooked, replaced
from catp_lightning.utils.on_cpu import on_cpu
from catp_lightning.utils.signatures import parameters_of

LARGE = ("input_ids", "inputs", "attention_mask", "position_ids", "labels", "cache_position")
SMALL = 2**16


def _is_small(value: Any) -> bool:
    """Return True for a tensor of few integers, or bool."""
    whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    return whole and value.numel() <= SMALL and value.layout == torch.strided


class ModelCall(dict[str, Any]):
    """Arguments of one model call, by name, and what is known of the call while it lasts.

    Nothing of a call outlives it, however it ends: what was seen of one that failed cannot serve another.

    Attributes:
        signals: what was observed in its vision part, by signal, or by signal and layer: of each of the last two
            forwards of that part, one tensor for each call of its attention.
        guide: attention in a guide model by layer, once the guide was asked.
        ids: int64 [B, L], ids that the embedding layer was given and no prompt was made of yet; None: none.
        begun: True once the decoder has run for it.
        labels: copy of its labels that a loss is computed of, changed once it is known which rows leave; None: no
            labels, or changed already.
        pictures: bool [B, N], which of N pictures of each sample are not all zeros, on the CPU; None: not asked yet, or
            `pixel_values` has no such dimensions.
    """

    def __init__(self, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(arguments or {})
        self.signals: dict[Any, list[list[Tensor]]] = {}
        self.guide: dict[int, Tensor] = {}
        self.ids: Tensor | None = None
        self.begun = False
        self.labels: Tensor | None = None
        self.pictures: Tensor | None = None
        self._read = False
        self._copies: dict[str, Tensor] = {}

    def read(self, *more: Tensor) -> list[Tensor]:
        """Return copies of `more` on the CPU, of integers or bool, and take all that is small over to there with them.

        Numbers that say how images lie in the prompt, sizes and grids for example, are then on the CPU among the
        arguments, so that only this call waits for a GPU.
        """
        names = [] if self._read else [name for name, value in self.items() if name not in LARGE and _is_small(value)]
        pixels, filled = self.get("pixel_values"), []
        if not self._read and isinstance(pixels, Tensor) and pixels.dim() == 5:
            filled = [pixels.flatten(2).any(2)]
        found = on_cpu(*more, *filled, *(self[name] for name in names))
        self.update(zip(names, found[len(more) + len(filled) :], strict=True))
        self.pictures = found[len(more)] if filled else self.pictures
        self._read = True
        return found[: len(more)]

    def know(self, name: str, copy: Tensor) -> None:
        """Keep a copy of an argument on the CPU, for `on_cpu`."""
        self._copies[name] = copy

    def on_cpu(self, name: str) -> Tensor:
        """Return a copy of an argument, a tensor of integers or bool, on the CPU; it is read once."""
        if name not in self._copies:
            (self._copies[name],) = on_cpu(self[name])
        return self._copies[name]


class CallTracker:
    """Tracker of one model's running calls: of its `generate`, its forward, and the forward of `outer`.

    Attributes:
        arguments: the running call of `outer`; empty if there is none.
        outermost: the running call of the model itself, which has the labels; empty if there is none.
        user_call: the user's call: generate's while it runs, else `arguments`. Newer versions of generate read pixels
            before they expand beams and hand on features alone. Where neither runs, because a caller runs the parts of
            the model one after the other, it stands for those, up to the prompt that they lead to.
        samples: number of samples that the running `generate` was given, or None; later tensors have a row for each
            beam.
        in_decoder: True while the decoder is running; set by the code that hooks it.

    Raises:
        PruningError: from a call that is running while another thread's is, or while the context is left.

    Args:
        model: the model whose `generate` is followed.
        outer: the module below the head, which turns ids and pixels into the decoder's input.
    """

    def __init__(self, model: PreTrainedModel, outer: nn.Module) -> None:
        self.model, self.outer = model, outer
        # Running calls, the innermost last: a hook may call the model again.
        self._calls: dict[nn.Module, list[ModelCall]] = {outer: [], model: []}
        self.samples: int | None = None
        self._generating: ModelCall | None = None
        self._by_hand: ModelCall | None = None
        self._length: int | None = None
        self.in_decoder = False
        self._inside, self._lock = False, threading.Lock()
        self._thread, self._depth = 0, 0  # the calling thread; number of nested calls
        self._names = {module: parameters_of(module.forward) for module in self._calls}
        kind: Any = type(model)
        self._generates = parameters_of(kind.generate)[1:]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the model's calls while inside; hooks are in place only there."""
        with ExitStack() as undo:
            undo.callback(self._forget)
            undo.callback(setattr, self, "_inside", False)
            self._inside = True
            for module in self._calls:
                undo.enter_context(hooked(module, self._call, self._called, always=True))
                undo.enter_context(_watched(module, self))
            undo.enter_context(replaced(self.model, "generate", self._generate))
            undo.enter_context(replaced(self.model, "init_continuous_batching", _refuse))
            yield

    def to_its_end(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return what a call returns.

        Raises:
            PruningError: the call has outlived the context: what it did after that was not pruned, or failed.
        """
        inside = self._inside
        try:
            found = call(*args, **kwargs)
        except Exception as error:
            if inside and not self._inside:
                raise _outlived() from error
            raise
        if inside and not self._inside:
            raise _outlived()
        return found

    def _begin(self) -> None:
        own = threading.get_ident()
        self.taken()
        with self._lock:
            if self._depth and self._thread != own:
                raise PruningError(
                    "Another thread is calling this pruned model. What is kept belongs to one call at a time: make the "
                    "calls one after the other, or give each thread a model of its own."
                )
            self._thread, self._depth = own, self._depth + 1

    def _end(self) -> None:
        with self._lock:
            if self._thread == threading.get_ident():  # not a thread that was refused
                self._depth = max(self._depth - 1, 0)

    def _forget(self) -> None:
        for running in self._calls.values():
            running.clear()

    @property
    def arguments(self) -> ModelCall:
        return self._calls[self.outer][-1] if self._calls[self.outer] else ModelCall()

    @property
    def outermost(self) -> ModelCall:
        return self._calls[self.model][-1] if self._calls[self.model] else ModelCall()

    @property
    def user_call(self) -> ModelCall:
        if self._generating is not None:
            return self._generating
        if self._calls[self.outer]:
            return self._calls[self.outer][-1]
        if self._by_hand is None:
            self._by_hand = ModelCall()
        return self._by_hand

    def taken(self) -> None:
        """Note that a prompt was made of what the running call brought: parts that are run by hand lead to another."""
        self._by_hand = None

    def rows_per_sample(self, rows: int) -> int:
        """Return how many of `rows` belong to each sample of the running `generate`; 1 outside of it."""
        return rows // self.samples if self.samples and rows % self.samples == 0 else 1

    def prompt_length(self, columns: int) -> int | None:
        """Return the number of columns of the running `generate`'s prompt, without those that it has generated.

        None outside of `generate`, where it is not known where a prompt ends and its answer begins.

        Args:
            columns: number of columns of the call; the first call's are the prompt, if no ids were given.
        """
        if self._generating is None:
            return None
        if self._length is None:  # its first call has the prompt, and drafts of an answer after it
            given = self._generating.get("input_ids")
            self._length = min(columns, given.shape[1]) if isinstance(given, Tensor) else columns
        return self._length

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begin()
        self._calls[module].append(ModelCall({**dict(zip(self._names[module], args, strict=False)), **kwargs}))

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._depth and self._thread == threading.get_ident():
            del self._calls[module][-1:]  # arguments are not held longer than the call lasts
        self._end()

    def interrupted(self) -> None:
        """Forget all running calls after an interrupt, when no hook is called for their ends."""
        self._forget()
        self._depth, self.in_decoder = 0, False

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._inside:
            raise _outlived()
        self._begin()
        prompt = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        before = self.samples, self._generating, self._length
        self.samples = len(prompt) if isinstance(prompt, Tensor) else None
        self._generating, self._length = ModelCall({**dict(zip(self._generates, args, strict=False)), **kwargs}), None
        try:
            return self.to_its_end(generate, *args, **kwargs)
        finally:
            self.samples, self._generating, self._length = before
            self._end()


def _refuse(*_: Any, **__: Any) -> None:
    raise PruningError(
        "generate_batch and its continuous batching answer in a thread of their own from one cache that all requests "
        "share, and no prompt can be made shorter there. Call generate on a batch, or leave the prune context."
    )


def _outlived() -> PruningError:
    return PruningError(
        "The prune context was left while this call was running in another thread, or before it began: its answer "
        "would be pruned in part. Wait for it inside the context, by thread.join() for example."
    )


class _Watched(Seen):
    """Forward of a module that is followed to its end, even if the module's hooks are gone by then."""

    by: CallTracker

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.by.to_its_end(self.func, *args, **kwargs)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            self.by.interrupted()
            raise


@contextmanager
def _watched(module: nn.Module, by: CallTracker) -> Iterator[None]:
    """Refuse calls of a module that outlive the context; its forward is replaced while inside."""
    own = module.__dict__["forward"]  # set by the hooks
    seen = _Watched(own)
    seen.by = by
    try:  # from here on: an interrupt may come at any line
        module.__dict__["forward"] = seen
        yield
    finally:
        if module.__dict__.get("forward") is seen:
            module.__dict__["forward"] = own
