"""Ends of the answers of a call of generate, as transformers itself decided them while it ran.

What ends an answer, and whether it is sampled, is settled inside the call, from its arguments, the generation config
they name, the model's own, stop strings and criteria. It is read there, never worked out again beside it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, MaxTimeCriteria, PreTrainedModel, StoppingCriteriaList

from catp_lightning.errors import PruningError
from catp_lightning.utils.hooks import replaced
from catp_lightning.utils.messages import warn


class Endings:
    """Record of what ended the answers of one call of `generate`.

    An answer that is none of those that were ended (a model's own `generate` cuts them, joins those of several calls or
    decodes by itself) ends with the first end-of-sequence token that the call resolves to.

    Args:
        model: the model whose `generate` decodes, inside that call or as that call.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self._config: GenerationConfig | None = None  # None: transformers' own decoding was not used
        self._noted: _Noted | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record what ends answers while `generate` runs inside.

        Raises:
            PruningError: two runs of the very same model would differ.
        """
        with replaced(self.model, "_get_stopping_criteria", self._settled):
            yield

    def _settled(self, original: Callable[..., StoppingCriteriaList], *args: Any, **kwargs: Any) -> Any:
        criteria, once = original(*args, **kwargs), self._config is None
        self._config = kwargs["generation_config"] if "generation_config" in kwargs else args[0]
        _refuse_unequal_runs(self._config, criteria)
        noted = _Noted(criteria, beams=(self._config.num_beams or 1) > 1)
        self._noted = noted if once else None  # None after several decodings: which answers are whose is not known
        return noted

    def valid(self, ids: Tensor, prompts: int, named: dict[str, Any]) -> Tensor:
        """Return which columns belong to the answers, the one that ends them included: bool [R, A].

        Args:
            ids: int64 [R, A], what `generate` returned, without its prompt.
            prompts: number of prompts; R is a multiple of it.
            named: the arguments of the call, by name: they decide if decoding was not transformers' own.

        Raises:
            PruningError: two runs of the very same model would differ.
        """
        config = self._config
        if config is None:
            given = {name: value for name, value in named.items() if name != "generation_config"}
            config = self.model._prepare_generation_config(named.get("generation_config"), **given)[0]
            _refuse_unequal_runs(config, named.get("stopping_criteria") or ())
        tokens = [] if config.eos_token_id is None else config.eos_token_id
        ends = torch.isin(ids, torch.as_tensor(tokens, device=ids.device, dtype=ids.dtype))
        if self._noted is not None:
            start = self._noted.prompt_length if self.model.config.is_encoder_decoder else 0
            noted = self._noted.ends(ids[:, start:], prompts, start)
            ends = torch.where(noted.any(1, keepdim=True), noted, ends)
        return ends.cumsum(1) - ends.long() == 0


class _Noted(StoppingCriteriaList):
    """Stopping criteria of one call, and a record of the answers that they ended.

    Without an end-of-sequence token rows that have ended go on beside the others; with one they are padded. Beams
    change places, so an answer is known by its tokens: the first of its beginnings that was ended is all of it.

    Attributes:
        prompt_length: number of columns before the first token that is generated.
    """

    def __init__(self, criteria: StoppingCriteriaList, beams: bool) -> None:
        super().__init__(criteria)
        self.beams, self.prompt_length = beams, -1
        self._rows = 0
        self._before: Tensor | None = None  # bool, rows that have ended
        self._ended: dict[int, set[tuple[int, ...]]] = {}  # tokens of answers that were ended, by row of the call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        if self._rows == 0:
            self._rows, self.prompt_length = len(input_ids), input_ids.shape[1] - 1
        new = done if self.beams or self._before is None else done & ~self._before
        self._before = done if self._before is None else done | self._before
        for row in new.nonzero()[:, 0].tolist():
            self._ended.setdefault(row, set()).add(tuple(input_ids[row, self.prompt_length :].tolist()))
        return done

    def ends(self, ids: Tensor, prompts: int, columns: int) -> Tensor:
        """Return where answers were ended, bool [R, columns + A].

        Args:
            ids: int64 [R, A], the answers.
            prompts: number of prompts.
            columns: number of columns to put before the answers; none of them ends an answer.
        """
        found = torch.zeros(len(ids), columns + ids.shape[1], dtype=torch.bool, device="cpu")
        each = self._rows // prompts
        for row, answer in enumerate(ids.tolist()):
            prompt = row * prompts // len(ids)
            ended = set().union(*(self._ended.get(prompt * each + beam, set()) for beam in range(each)))
            for length in {len(one) for one in ended}:
                if tuple(answer[:length]) in ended:
                    found[row, columns + length - 1] = True
        return found.to(ids.device)


def _refuse_unequal_runs(config: GenerationConfig, criteria: Any) -> None:
    if config.do_sample:
        raise PruningError(
            "Answers are sampled (do_sample=True, in the call or in the model's generation config): two runs of one "
            "model differ, so agreement means nothing. Pass do_sample=False, with beams or without, for calibration "
            "and for compare=True."
        )
    if config.max_time is not None or any(isinstance(one, MaxTimeCriteria) for one in criteria):
        raise PruningError(
            "Answers end by the clock (max_time): two runs of one model differ, so agreement means nothing. Limit "
            "max_new_tokens instead for calibration and for compare=True."
        )


@contextmanager
def warned_of_chance(model: PreTrainedModel) -> Iterator[None]:
    """Warn if random numbers are drawn while inside: by dropout in training mode, or by decoding of one's own."""
    before = _random_state(model)
    yield
    if any(not torch.equal(one, other) for one, other in zip(before, _random_state(model), strict=True)):
        warn(
            f"Random numbers were drawn while the {type(model).__name__} answered, so two runs of it may differ, and "
            "agreement then means little: put it in evaluation mode, and decode without drawing.",
            stacklevel=2,
        )


def _random_state(model: PreTrainedModel) -> list[Tensor]:
    of_device = [torch.cuda.get_rng_state(model.device)] if model.device.type == "cuda" else []
    return [torch.get_rng_state(), *of_device]
