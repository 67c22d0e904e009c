"""What components of questions mean: the questions at their ends, and the section of the report that shows them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning import PruningPolicy
from catp_lightning.calibration.fit import texts
from catp_lightning.calibration.fit.texts import LONGEST, QuestionTexts, described
from catp_lightning.calibration.report.questions import SHOWN, decoded, questions_section
from catp_lightning.callbacks import CrossAttentionCalibration
from catp_lightning.methods.components import HASHED, Question
from tests.support.calibrations import QUICK, data
from tests.support.models import faint_blip2, greedily
from tests.support.modules import Generating
from tests.support.reports import tables, with_evidence, write
from tests.support.trainers import loading, trainer

HEADING = "What questions are told apart by"
COMPONENTS = [
    {"variance": 0.625, "low": [[1, 2], [3]], "high": [[4, 5, 6], list(range(100, 100 + LONGEST))]},
    {"variance": 0.25, "low": [[4, 5, 6], [1, 2]], "high": [[3], [7]]},
]
NETWORK = {"explained": 0.123, "explained_error": 0.0145, "records": 321}


def asked(count: int, width: int = 6) -> tuple[Tensor, Tensor]:
    """Ids of different lengths, from 2 to 8, then -1; and an embedding of each."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (count, 8), generator=draw)
    ids[torch.arange(8) >= torch.randint(2, 9, (count, 1), generator=draw)] = -1
    return ids, torch.randn(count, width, generator=draw)


def added(*parts: tuple[Tensor, Tensor]) -> QuestionTexts:
    metric = QuestionTexts()
    for ids, embeddings in parts:
        metric.update(ids, embeddings)
    return metric


@pytest.mark.parametrize("limit", [100, 9])
def test_recorded_questions_do_not_depend_on_order_processes_or_padding(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "MOST", limit)
    ids, embeddings = asked(30)
    twice, rows = torch.cat([ids, ids[:7]]), torch.cat([embeddings, embeddings[:7]])
    expected = added((twice, rows)).compute()
    padded = torch.nn.functional.pad(twice, (0, 3), value=-1)
    batches = [(padded[part], rows[part]) for part in torch.arange(37).flip(0).split(5)]
    several = [added(*batches[:3]), added(*batches[3:]), QuestionTexts()]
    together = QuestionTexts()
    for name in ("keys", "ids", "embeddings"):  # as they are reduced over processes
        setattr(together, name, torch.cat([getattr(one, name)[0].view(-1, *getattr(several[0], name)[0].shape[1:])
                                           for one in several]))  # fmt: skip
    for found in (added(*batches).compute(), together.compute()):
        assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert len(expected[0]) == min(limit, 30)
    lists = [[token for token in row if token >= 0] for row in ids.tolist()]
    for tokens, embedding in zip(*expected, strict=True):
        assert torch.equal(embedding[:6], embeddings[lists.index(tokens)]) and not embedding[6:].any()


def test_of_long_questions_the_first_ids_are_recorded_and_damaged_ones_are_left_out() -> None:
    ids = torch.arange(3 * LONGEST).expand(3, -1).clone()
    ids[1, -1], ids[2, 0] = 5, 5
    found, embeddings = added((ids, torch.tensor([[1.0], [2.0], [torch.nan]]))).compute()
    assert found == [list(range(LONGEST))] * 2, "they differ further on"
    assert sorted(embeddings[:, 0].tolist()) == [1, 2] and embeddings.shape == (2, HASHED)
    assert QuestionTexts().compute()[0] == []


def test_a_component_has_its_share_of_the_variance_and_its_extreme_questions() -> None:
    draw = np.random.default_rng(0)
    values = draw.standard_normal((40, 2)) * [3, 1]
    values = (values - values.mean(0)) @ np.linalg.qr(draw.standard_normal((2, 2)))[0]
    embeddings = torch.zeros(40, HASHED)
    embeddings[:, :2] = torch.from_numpy(values)
    variances, vectors = np.linalg.eigh(values.T @ values / 40)
    basis = vectors.T[::-1] / np.sqrt(variances[::-1])[:, None]
    found = described(Question.of(basis, np.zeros(2)), variances.sum(), ([[n] for n in range(40)], embeddings))
    assert [one["variance"] for one in found] == pytest.approx(variances[::-1] / variances.sum(), rel=1e-4)
    for one, row in zip(found, basis, strict=True):
        order = (values @ row).argsort()
        assert one["low"] == [[n] for n in order[:3]] and one["high"] == [[n] for n in order[:-4:-1]]
    two = described(Question.of(basis, np.zeros(2)), variances.sum(), ([[0], [1], [2]], embeddings[:3]))
    assert all(len(one["low"]) == len(one["high"]) == 1 and one["low"] != one["high"] for one in two)


def test_questions_of_the_same_words_are_in_the_order_of_their_fingerprints_whatever_rounding() -> None:
    embeddings = torch.zeros(6, HASHED)
    embeddings[:, 0] = torch.tensor([0.0, 1, 1, 1, 1, 2])
    question = Question.of(np.ones((1, 1)), np.zeros(1))
    (one,) = described(question, 1.0, ([[n] for n in range(6)], embeddings))
    embeddings[:, 0] += torch.tensor([0, 3e-7, 2e-7, 1e-7, 0, 0])
    (other,) = described(question, 1.0, ([[n] for n in range(6)], embeddings))
    assert one == other and one["low"] == [[0], [1], [2]]


def with_components(policy: PruningPolicy, **fitted: Any) -> PruningPolicy:
    own = {name: value for name, value in policy.evidence["fitted"].items() if name != "learned"}
    return with_evidence(policy, components=COMPONENTS, fitted={**own, **fitted})


def test_the_report_shows_the_text_of_questions_and_what_the_network_explains(
    policies: list[PruningPolicy], tmp_path: Path
) -> None:
    class Tokenizer:
        def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return " ".join(f"<b>{token}|\x1b\n" for token in ids)

    class Holder:
        def __init__(self, **own: Any) -> None:
            vars(self).update(own)

    one = with_components(policies[0], learned=NETWORK)
    holders = ([Holder(tokenizer=Tokenizer())], [Holder(), Holder(processor=Holder(tokenizer=Tokenizer()))])
    pages = [write([one], tmp_path, None, 0, modules)[1] for modules in holders]
    assert pages[0] == pages[1]
    assert '| 1 | 62.5% | "&lt;b&gt;1\\|\\\\x1b &lt;b&gt;2\\|\\\\x1b", "&lt;b&gt;3\\|\\\\x1b" |' in pages[0]
    assert '…" |\n' in pages[0] and "token ids here" not in pages[0] and "\x1b" not in pages[0]
    assert "trained on 321 recorded samples, explains 12.30% ± 1.45% of the variance" in pages[0]


def test_what_all_questions_begin_and_end_with_is_not_shown(policies: list[PruningPolicy]) -> None:
    def decode(ids: Sequence[int]) -> str:
        return f"Question: is it {ids[0]} \n or more? Answer: "

    policy = with_components(policies[0])
    assert '| "1", "3" | "4", "100" |' in questions_section(policy, decode)
    assert '| "a b", "a b" | "a b", "a b" |' in questions_section(policy, lambda ids: " a  b "), "nothing would be left"


class Words:
    """Tokenizer whose every token is a word."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"w{token}" for token in ids)


class Failing:
    @property
    def tokenizer(self) -> Any:
        raise RuntimeError("there is no such file")


class Late:
    class tokenizer:
        @staticmethod
        def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
            if 7 in ids:
                raise OverflowError("out of range")
            return "fine"


@pytest.mark.slow
@pytest.mark.parametrize("modules", [(), (object(),), (Failing(),), (Late(),)])
def test_without_a_tokenizer_that_works_the_report_shows_ids(
    modules: tuple[object, ...], policies: list[PruningPolicy], tmp_path: Path
) -> None:
    _, page = write([with_components(policies[0])], tmp_path, None, 0, modules)
    rows = tables(page, HEADING)
    long = " ".join(map(str, COMPONENTS[0]["high"][1]))  # type: ignore[index]
    assert rows[0] == ["1", "62.5%", '"1 2", "3"', f'"4 5 6", "{long[: SHOWN - 1]}…"']
    assert rows[1] == ["2", "25.0%", '"4 5 6", "1 2"', '"3", "7"']
    assert "Questions are token ids here, because" in page and "fine" not in page
    assert "No network (*learned*) takes part: what one explains" in page


def calibrated(path: Path, module: Generating, batches: list[dict[str, Tensor]]) -> PruningPolicy:
    callback = CrossAttentionCalibration(path, settings=QUICK)
    trainer(callback).predict(module, loading(batches))
    return callback.policies[0]


@pytest.mark.slow
def test_a_calibration_says_what_questions_it_told_apart(tmp_path: Path) -> None:
    module, batches = Generating(faint_blip2(0.2), greedily(1)), data(48, 24)
    module.tokenizer = Words()
    policy = calibrated(tmp_path / "p.json", module, batches)
    components = policy.evidence["components"]
    texts = {
        tuple(ids[mask == 1][8:].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert 0.5 < sum(one["variance"] for one in components) <= 1 + 1e-6
    assert [one["variance"] for one in components] == sorted((one["variance"] for one in components), reverse=True)
    for one in components:
        ends = [*map(tuple, one["low"]), *map(tuple, one["high"])]
        assert len(set(ends)) == 6 and set(ends) <= texts
    page = (tmp_path / "p-report" / "report.md").read_text()
    rows = tables(page, HEADING)
    assert len(rows) == len(components) and "token ids here" not in page
    assert f'"{Words().decode(components[0]["high"][0], True)}"' in rows[0][3]


@pytest.mark.slow
def test_where_all_questions_are_alike_there_is_no_section(tmp_path: Path) -> None:
    batches = data(48, 24)
    for batch in batches:
        batch["input_ids"][:], batch["attention_mask"][:] = batches[0]["input_ids"][1], batches[0]["attention_mask"][1]
    policy = calibrated(tmp_path / "p.json", Generating(faint_blip2(0.2), greedily(1)), batches)
    assert "components" not in policy.evidence and questions_section(policy, Words().decode) == ""
    assert HEADING not in (tmp_path / "p-report" / "report.md").read_text()


def test_the_first_tokenizer_decodes_and_none_is_an_error() -> None:
    assert decoded((object(), Late()), [1, 2]) == "fine"
    with pytest.raises(LookupError, match="no module has a tokenizer"):
        decoded((object(),), [1])
