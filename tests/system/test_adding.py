"""What CONTRIBUTING.md says about adding a selector, a model family and a place where tokens leave, done here."""

import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import transformers as hf
from matplotlib.figure import Figure
from torch import Tensor, nn

from catp_lightning import PruningPolicy, prune
from catp_lightning.calibration import statistics
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.statistics import Statistic
from catp_lightning.methods import SELECTORS, Selector
from catp_lightning.models import FAMILIES, find_family
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.prompt.caches import cache_in
from catp_lightning.pruning.pruner import applied
from catp_lightning.pruning.sites import SITES, PruningSite
from catp_lightning.pruning.sites.prompt_capture import PromptCapture
from catp_lightning.utils.hooks import hooked
from tests.support.calibrations import calibrate, data
from tests.support.contributing import section
from tests.support.decoder_oracle import Decoder
from tests.support.families import ROWS
from tests.support.footprints import footprint
from tests.support.matrix import generate, scale, settled, uneven
from tests.support.merging import merged
from tests.support.modules import Generating
from tests.support.rows import Row
from tests.support.samples import pictures, prompts
from tests.support.small_calibrations import QUICKEST
from tests.support.small_configs import GATED, IMAGE, siglip

LLAVA = next(row for row in ROWS if row.name == "Llava")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def example(title: str, *imports: str) -> dict[str, Any]:
    """Names that the code block of a section of CONTRIBUTING.md defines; `imports` are those of the block's file."""
    (code,) = re.findall(r"```python\n(.*?)```", section(title), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join([*imports, textwrap.dedent(code)]), names)
    return names


# --- A selector


@pytest.fixture
def merge_nearest(monkeypatch: pytest.MonkeyPatch) -> type[Selector]:
    """The selector of CONTRIBUTING.md, registered under a name."""
    names = example(
        "Add a selector",
        "from dataclasses import dataclass",
        "from typing import ClassVar",
        "import torch",
        "from torch import Tensor",
        "from catp_lightning.methods import Selection, Selector",
        "from catp_lightning.methods.selectors.base import ranked",
    )
    found: type[Selector] = names["MergeNearest"]
    monkeypatch.setitem(SELECTORS._own, "merge-nearest", found)
    return found


def destinations(scores: list[float], budget: int) -> list[int]:
    """Slow version: of the tokens of one image or sample, the one that each is merged into."""
    kept = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:budget]
    return [min(sorted(kept), key=lambda other, token=token: abs(other - token)) for token in range(len(scores))]


@pytest.mark.parametrize("per", ["image", "sample"])
def test_the_selector_that_contributing_shows_is_used_by_its_name_and_merging_is_exact(
    merge_nearest: type[Selector], per: str
) -> None:
    policy = PruningPolicy("l2-norm", {}, "merge-nearest", {"per": per}, keep=4)
    assert policy.build_selector() == merge_nearest(per=per)  # type: ignore[arg-type]
    model, inputs = LLAVA.model(), LLAVA.inputs([0, 1, 2, 3])
    with prune(model, policy) as pruning:
        tokens, steps = generate(LLAVA, model, inputs)
    assert pruning.scores is not None and pruning.destination is not None
    for row, images in enumerate((1, 2, 1, 0)):  # of 9 tokens each
        size = 9 if per == "image" else 9 * images  # tokens that share a budget
        expected: list[int] = []
        for start in range(0, 9 * images, size or 1):
            own = pruning.scores[row, start : start + size].tolist()
            expected += [start + into for into in destinations(own, 4)]
        assert pruning.destination[row].tolist() == expected + [-1] * (18 - 9 * images)
    with merged(LLAVA, model, inputs, pruning):
        expected_tokens, expected_steps = generate(LLAVA, model, inputs)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(steps, expected_steps, rtol=0, atol=LLAVA.tolerance() * scale(steps))


def test_it_ranks_ties_and_what_is_no_number_as_every_selector_does(merge_nearest: type[Selector]) -> None:
    scores = torch.tensor([[torch.nan, 1.0, 2.0, 2.0, torch.nan, 9.0], [3.0, torch.nan, 0.0, 0.0, 0.0, 0.0]])
    visual = torch.tensor([[True] * 5 + [False], [False] * 6])
    selection = merge_nearest().select(scores, visual, torch.tensor([2, 0]), None)
    assert selection.destination is not None
    assert selection.keep.tolist() == [[False, False, True, True, False, False], [False] * 6]
    assert selection.destination.tolist() == [[2, 2, 2, 3, 3, -1], [-1] * 6]


# --- A model family


def cohere2_vision() -> hf.PreTrainedModel:
    """Return a small Cohere2 Vision, whose decoder has sliding windows, under a type that nobody lists."""
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(image_size=48),
        text_config=hf.Cohere2Config(**GATED, sliding_window=12),
        alignment_intermediate_size=64,
        image_token_id=IMAGE,
    )
    model = hf.Cohere2VisionForConditionalGeneration(config)
    model.config.model_type = "my_vision"
    return model


COHERE = Row("Cohere2Vision", cohere2_vision, lambda: prompts(pictures(9, (3, 48, 48))), Decoder())


def test_a_family_of_two_lines_is_found_and_pruned_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = COHERE.model(), COHERE.inputs()
    with pytest.warns(UserWarning, match="Cohere2VisionForConditionalGeneration is not among the models"):
        assert type(find_family(model)) is Placeholder
    names = example("Add a model family", "from catp_lightning.models.placeholder import Placeholder")
    *others, last = FAMILIES
    assert last is Placeholder, "models of no other family"
    monkeypatch.setattr("catp_lightning.models.find.FAMILIES", (*others, names["MyVision"], last))
    full = generate(COHERE, model, inputs)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with prune(model, PruningPolicy("l2-norm", keep=0.5)) as pruning:
            tokens, steps = generate(COHERE, model, inputs)
    assert type(find_family(model)) is names["MyVision"] and find_family(model).name == "my-vision"
    assert pruning.keep is not None and pruning.keep.sum(1).tolist() == [5, 10, 5]
    with COHERE.oracle.masked(model, inputs, pruning.keep):
        masked_tokens, masked = generate(COHERE, model, inputs)
    assert scale(masked - full) > 0.1 * scale(full), "dropping must move logits, or this proves nothing"
    assert torch.equal(tokens, masked_tokens)
    torch.testing.assert_close(steps, masked, rtol=0, atol=COHERE.tolerance() * scale(full))


# --- A place where tokens leave


class HideAtDecoderInput(PruningSite):
    """Tokens are hidden from all attention at the decoder's entry, where `PruneAtDecoderInput` drops them."""

    reads = "decoder"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._prompts = PromptCapture(self.family, self.calls)
        self._seen: Tensor | None = None  # int64 [R, L], columns of the last prompt that are seen; None: text alone

    @contextmanager
    def installed(self) -> Iterator[None]:
        with self._prompts.watching(), hooked(self.family.decoder, self._enter):
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        rows, cache = kwargs["inputs_embeds"], cache_in(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        if past == 0:
            prompt = self._prompts.take(kwargs)
            self._seen = None if prompt is None else prompt.mask * prompt.columns(self.decide(prompt).keep)
        if self._seen is None:
            return None
        mask = self._prompts.mask(kwargs, len(rows), past + rows.shape[1], rows.device)
        return args, {**kwargs, "attention_mask": torch.cat([self._seen, mask[:, self._seen.shape[1] :]], 1)}


def test_a_place_of_a_few_lines_is_used_by_prune_and_equals_the_one_that_drops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs, policy = settled(LLAVA), LLAVA.inputs(), PruningPolicy("l2-norm", keep=0.3)
    before, full = footprint(model), generate(LLAVA, model, inputs)[1]
    with prune(model, policy) as dropping:
        tokens, steps = generate(LLAVA, model, inputs)
        short = LLAVA.oracle.cached(model(**inputs, use_cache=True))
    monkeypatch.setattr("catp_lightning.pruning.sites.SITES", (HideAtDecoderInput, *SITES))
    with applied(model, policy) as pruner:
        assert type(pruner.site) is HideAtDecoderInput
        hidden_tokens, hidden = generate(LLAVA, model, inputs)
        length = LLAVA.oracle.cached(model(**inputs, use_cache=True))
    assert footprint(model) == before
    assert torch.equal(pruner.record.keep, dropping.keep) and torch.equal(hidden_tokens, tokens)
    assert short < length == inputs["input_ids"].shape[1], "hidden tokens stay in the cache"
    assert scale(hidden - full) > 0.1 * scale(full), "hiding must move logits, or this proves nothing"
    torch.testing.assert_close(hidden, steps, rtol=0, atol=LLAVA.tolerance() * scale(full))


def test_the_same_place_takes_a_choice_and_is_the_unpruned_model_where_everything_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("catp_lightning.pruning.sites.SITES", (HideAtDecoderInput, *SITES))
    model, inputs = LLAVA.model(), LLAVA.inputs([0, 1, 2, 3], pads=2)
    full = generate(LLAVA, model, inputs, num_beams=3)
    with prune(model, PruningPolicy(keep=1.0)) as pruning:
        same = generate(LLAVA, model, inputs, num_beams=3)
    assert torch.equal(pruning.keep, LLAVA.oracle.tokens(inputs)) and torch.equal(same[0], full[0])
    with prune(model, PruningPolicy(), choose=uneven()) as pruning:
        tokens, steps = generate(LLAVA, model, inputs, num_beams=3)
    with LLAVA.oracle.masked(model, inputs, pruning.keep):
        masked_tokens, masked = generate(LLAVA, model, inputs, num_beams=3)
    assert torch.equal(tokens, masked_tokens)
    torch.testing.assert_close(steps, masked, rtol=0, atol=LLAVA.tolerance() * scale(full[1]))


class PromptLength(Statistic):
    """Number of tokens in each prompt, image tokens included: its mean."""

    name, caption = "prompt_length", "Mean length of a prompt."

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    @classmethod
    def of(cls, plan: Plan) -> Self:
        return cls()

    def update(self, samples: Samples) -> None:
        self.total = self.total + torch.stack([samples.replay.lengths.sum(), torch.tensor(len(samples.images))])

    def compute(self) -> float:
        return float(self.total[0] / self.total[1])

    @staticmethod
    def figure(entry: float) -> Figure | None:
        figure = Figure()
        figure.subplots().bar([0], [entry])
        return figure


@pytest.mark.slow
def test_a_statistic_that_is_added_is_in_evidence_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "STATISTICS", (*statistics.STATISTICS, PromptLength))
    monkeypatch.setattr("catp_lightning.calibration.report.report.FIGURES", {})  # only those of statistics
    batches = data(16, 8)
    policy = calibrate(Generating(), batches, tmp_path / "p.json", calibration=QUICKEST).policies[0]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert policy.evidence["prompt_length"] == lengths.double().mean().item()
    assert "rank_correlation" in policy.evidence, "beside the others"
    written = tmp_path / "p-report"
    assert (written / "prompt_length.png").read_bytes().startswith(b"\x89PNG")
    assert "Mean length of a prompt." in (written / "report.md").read_text()
