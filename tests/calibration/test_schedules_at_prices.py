"""Calibration at prices: schedules compete with rules at the decoder's input, at what they cost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from catp_lightning import CrossAttentionCalibration, PolicyError, PruningPolicy, TokenPruning
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.search.payments import Payments, Stop
from catp_lightning.calibration.search.schedules import Losses, proposals
from catp_lightning.callbacks.budgets import Budgets
from catp_lightning.callbacks.token_pruning import load_policy
from catp_lightning.models import find_family
from catp_lightning.pricing import PrefillProfile
from catp_lightning.pruning.pruner import applied
from tests.support.calibrations import figures
from tests.support.family_calibrations import QUICK, SETTINGS, agreement, data
from tests.support.modules import Generating
from tests.support.stages import LLAMA
from tests.support.trainers import loading, trainer

BATCHES = 3  # enough for what is tested, and most of the time goes with them
PRICES = {"tokens_per_layer": [0.6, 0.4]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PruningPolicy]]:
    """The folder of a calibration at two prices, and its policies."""
    place = tmp_path_factory.mktemp("prices")
    callback = CrossAttentionCalibration(place, budget=PRICES, settings=QUICK)
    trainer(callback).predict(Generating(LLAMA.model(), SETTINGS), loading(data(LLAMA)[:BATCHES]))
    return place, callback.policies


@pytest.mark.slow
def test_what_is_measured_of_a_schedule_is_what_pruning_does(found: tuple[Path, list[PruningPolicy]]) -> None:
    _, policies = found
    for policy in policies:
        chosen = figures(policy, policy.evidence["chosen"])
        assert chosen["check"]["agreement"] == pytest.approx(agreement(LLAMA, policy, batches=BATCHES)[1], abs=1e-12)
        names = [row["name"] for row in policy.evidence["candidates"]]
        assert any(", fastv at layer" in name or ", sparsevlm at layer" in name for name in names), "schedules competed"
        assert {"random", "l2-norm", "diversity of outputs"} <= set(names), "at the same price"
        assert sum(bool(row.get("inside") and row["check"]) for row in policy.evidence["candidates"]) <= 1


def test_a_policy_costs_what_its_evidence_says_and_no_more_than_its_price(
    found: tuple[Path, list[PruningPolicy]],
) -> None:
    for policy, price in zip(found[1], PRICES["tokens_per_layer"], strict=True):
        assert policy.budget == {"tokens_per_layer": price}
        paid, full, model = 0.0, 0.0, LLAMA.model()
        read: list[Any] = []
        with applied(model, policy, on_prefill=read.append), torch.no_grad():
            for batch in data(LLAMA)[:BATCHES]:
                model.generate(**batch, **SETTINGS)
        for prefill in read:
            paid, full = paid + prefill.tokens_per_layer.sum().item(), full + prefill.counts.sum().item()
        assert policy.evidence["prices"]["tokens_per_layer"] <= price * (1 + 1e-9)
        assert {"tokens", "prefill_flops", "cache_bytes"} < policy.evidence["prices"].keys()
        assert paid / full == pytest.approx(policy.evidence["prices"]["tokens_per_layer"], rel=0.1), "several images"


def test_a_folder_gives_the_best_point_that_a_price_pays_for(found: tuple[Path, list[PruningPolicy]]) -> None:
    place, (dear, cheap) = found
    assert sorted(file.name for file in place.glob("*.json")) == [
        "budget-tokens_per_layer-0.4.json",
        "budget-tokens_per_layer-0.6.json",
    ]
    best = dear if figures_of(dear) >= figures_of(cheap) else cheap
    assert PruningPolicy.load(place, budget={"tokens_per_layer": 1.0}) == best
    assert PruningPolicy.load(place, budget={"tokens_per_layer": 0.5}) == cheap
    middle = (cheap.evidence["prices"]["cache_bytes"] + dear.evidence["prices"]["cache_bytes"]) / 2
    if cheap.evidence["prices"]["cache_bytes"] < middle:
        assert PruningPolicy.load(place, budget={"cache_bytes": middle}) == cheap, "in another unit than was asked for"
    with pytest.raises(
        PolicyError, match=r"no policy that costs at most 0\.1 of the unpruned model's tokens_per_layer"
    ):
        PruningPolicy.load(place, budget={"tokens_per_layer": 0.1})
    with pytest.raises(PolicyError, match=r"several budgets .*name one with keep=… or budget=…"):
        PruningPolicy.load(place)
    with pytest.raises(PolicyError, match=r"costs 0\.\d+ of the unpruned model's tokens_per_layer, and budget asks"):
        PruningPolicy.load(place / "budget-tokens_per_layer-0.6.json", budget={"tokens_per_layer": 0.3})


def test_token_pruning_takes_a_point_of_the_front(found: tuple[Path, list[PruningPolicy]]) -> None:
    place, (dear, cheap) = found
    callback = TokenPruning(place, budget={"tokens_per_layer": 0.5})
    module = Generating(LLAMA.model(), SETTINGS)
    with pytest.warns(UserWarning, match="images that the policy was calibrated on"):
        trainer(callback).predict(module, loading(data(LLAMA)[:2]))
    assert callback.figures["catp/tokens_per_layer"] < 0.5 * 60 and callback._loaded == cheap
    with pytest.raises(PolicyError, match=r"given as an object, of budget .*Give the folder"):
        load_policy(dear, None, {"tokens_per_layer": 0.4})
    with pytest.raises(PolicyError, match="budget is in 'flops'"):
        TokenPruning(place, budget={"flops": 0.5})


def figures_of(policy: PruningPolicy) -> tuple[float, float]:
    checked = figures(policy, policy.evidence["chosen"])["check"]["agreement"]
    return checked, -policy.evidence["prices"]["tokens_per_layer"]


def test_the_report_draws_the_front_and_names_all_prices(found: tuple[Path, list[PruningPolicy]]) -> None:
    place, _ = found
    page = (place / "report" / "report.md").read_text()
    assert "![front](front.png)" in page and "retention.png" not in page
    header = next(line for line in page.splitlines() if "cache_bytes paid" in line)
    assert header.startswith("| tokens_per_layer | tokens paid | tokens_per_layer paid | prefill_flops paid")
    assert "## Candidates at tokens_per_layer 0.4" in page


@pytest.mark.slow
def test_a_promise_is_kept_at_the_least_price(tmp_path: Path) -> None:
    callback = CrossAttentionCalibration(
        tmp_path / "policy.json",
        budget={"tokens_per_layer": None},
        max_disagreement=0.9,
        confidence=0.6,
        settings=QUICK,
    )
    with pytest.warns(
        UserWarning, match=r"budget: 0\.0625 of tokens_per_layer cannot be met even with one visual token"
    ):
        trainer(callback).predict(Generating(LLAMA.model(), SETTINGS), loading(data(LLAMA)))
    (policy,) = callback.policies
    promise = policy.evidence["promise"]
    assert promise["unit"] == "tokens_per_layer"
    kept = [step["keep"] for step in promise["steps"] if step["holds"]]
    assert policy.budget == {"tokens_per_layer": min(kept)} and kept == sorted(kept, reverse=True)


def sizes(count: int = 40) -> torch.Tensor:
    text = torch.randint(5, 20, (count,), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(20, 60, (count,), generator=torch.Generator().manual_seed(1))
    return torch.stack([text, tokens, tokens, torch.zeros_like(text)], 1)


@pytest.mark.parametrize("unit", ["tokens_per_layer", "prefill_flops", "cache_bytes"])
def test_proposals_cost_the_price_and_are_ordered_by_predicted_loss(unit: str) -> None:
    family = find_family(LLAMA.model())
    payments = Payments.of_samples(replace(Plan.of(family), unit=unit), sizes())
    entry = {0.75: 0.01, 0.5: 0.05, 0.25: 0.3}
    inside = {
        (layer, share): (4 - layer) * (1 - share) for layer in (1, 2, 3) for share in (0.5, 0.25, 0.125, 0.0625, 0)
    }
    losses = Losses(entry, inside, dict.fromkeys((1, 2, 3), 0))
    found = proposals(family, losses, payments, 0.5)
    paid = [payments.paid(stops) for stops in found]
    assert paid and max(paid) <= 0.5 and sum(price > 0.45 for price in paid) > len(paid) / 2
    assert [losses.predicted(stops) for stops in found] == sorted(losses.predicted(stops) for stops in found)
    assert len({len(stops) for stops in found}) > 1
    assert Payments.paid(payments, (Stop(0, 1.0),)) == 1.0


def test_a_price_that_the_text_alone_exceeds_is_refused_with_what_is_possible() -> None:
    payments = Payments.of_samples(replace(Plan.of(find_family(LLAMA.model())), unit="cache_bytes"), sizes())
    rule = PruningPolicy("position")
    with pytest.raises(PolicyError, match=r"0\.05 of cache_bytes cannot be met here: .* still costs 0\.[23]"):
        payments.reachable(rule.with_keep, [0.5, 0.05], some=False)
    with pytest.warns(UserWarning, match=r"budget: 0\.05 of cache_bytes cannot be met"):
        assert payments.reachable(rule.with_keep, [0.5, 0.05], some=True)[0] == (0.5,)


def test_a_budget_in_seconds_counts_the_dearest_method_that_may_choose() -> None:
    rows = ((10, 1.0), (100, 10.0))  # a tenth of a second a row
    costs = {"l2-norm with top-k": ((0, 0.5),), "stride with top-k": ((0, 0.1),), "fastv with top-k": ((0, 0.25),)}
    profile = PrefillProfile("Llava", "cpu", 1, 4, False, rows, costs)
    plan = replace(Plan.of(find_family(LLAMA.model())), unit="prefill_time", profile=profile)
    payments = Payments.of_samples(plan, torch.tensor([[20, 80, 80, 0]]))
    assert payments.paid((Stop(0, 1.0),)) == pytest.approx((10 + 0.5) / 10), "choosing is paid for"
    assert payments.paid((Stop(0, 0.5), Stop(2, 0.25))) == pytest.approx(((6 * 2 + 4 * 2) / 4 + 0.5 + 0.25) / 10)
    keep = payments.most(lambda share: (Stop(0, share),), 0.5)
    assert keep is not None and 0.2 + keep * 0.8 + 0.05 == pytest.approx(0.5, abs=0.01)
    known = payments.of(PruningPolicy("stride", keep=0.5))
    assert known["prefill_time"] == pytest.approx((6 + 0.1) / 10) and {"cache_bytes", "tokens"} < known.keys()
    assert payments.of(PruningPolicy("random", keep=0.5))["prefill_time"] == pytest.approx((6 + 0.5) / 10), "unmeasured"
    with pytest.raises(PolicyError, match=r"needs the seconds .*profile=catp_lightning\.pricing\.measure"):
        CrossAttentionCalibration(budget={"prefill_time": 0.5})


@pytest.mark.parametrize(
    ("keep", "budget", "says"),
    [
        (0.5, {"tokens": 0.5}, "one calibration has one of them"),
        (None, {"tokens": [0.5, 0.5]}, "one price or several different ones"),
        (None, {"tokens": []}, "one price or several different ones"),
        (None, {"flops": 0.5}, "budget is in 'flops'"),
        (None, {"tokens": None}, "budget is None of tokens"),
        (None, 0.5, "budget is 0.5; a budget is a share"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(keep: Any, budget: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        Budgets.of(keep, budget, promised=False)


def test_what_cannot_be_priced_or_does_not_go_together_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"What visual-exit costs is its layer.*without a scorer"):
        CrossAttentionCalibration("p", budget={"tokens_per_layer": 0.5}, scorer="visual-exit")
    profile = PrefillProfile("Llava", "cpu", 1, 32, False, ((10, 1.0), (100, 10.0)))
    callback = CrossAttentionCalibration(budget={"prefill_time": 0.5}, profile=profile)
    with pytest.raises(
        PolicyError, match="a Llava of 32 layers, and this model is a LlavaForConditionalGeneration of 4"
    ):
        trainer(callback).predict(Generating(LLAMA.model(), SETTINGS), loading(data(LLAMA)[:1]))


@pytest.mark.slow
def test_a_method_inside_the_decoder_is_calibrated_at_prices_and_at_all_tokens(tmp_path: Path) -> None:
    budget = {"tokens_per_layer": [1.0, 0.7]}
    callback = CrossAttentionCalibration(
        tmp_path, budget=budget, scorer="fastv", scorer_args={"layer": 2}, settings=QUICK
    )
    trainer(callback).predict(Generating(LLAMA.model(), SETTINGS), loading(data(LLAMA)))
    whole, some = callback.policies
    assert whole.everything and figures(whole, whole.evidence["chosen"])["check"]["agreement"] == 1.0
    assert 0.6 < some.evidence["prices"]["tokens_per_layer"] <= 0.7 and some.scorer == "fastv"


def test_published_schedules_compete_at_the_price(found: tuple[Path, list[PruningPolicy]]) -> None:
    for policy in found[1]:
        names = [row["name"] for row in policy.evidence["candidates"]]
        assert any(name.startswith("divprune+fastv to ") for name in names)


def test_another_budget_has_no_price_until_it_is_measured(found: tuple[Path, list[PruningPolicy]]) -> None:
    plain = replace(found[1][0], then=())
    other = plain.with_keep(0.9)
    assert other.budget is None and "prices" not in other.evidence and "prices" in plain.evidence
