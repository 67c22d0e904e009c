"""The report of a calibration says what its policies record: its lines, its page and its table."""

import re

import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from catp_lightning import PruningPolicy
from catp_lightning.calibration.report import report as writing
from catp_lightning.calibration.report.controls import against
from catp_lightning.calibration.report.figures import (
    head_figure,
    layer_figure,
    retention_figure,
)
from catp_lightning.calibration.report.page import CAPTIONS, SHOWN
from catp_lightning.calibration.report.report import COLUMNS, FIGURES, candidate_rows, report, report_folder
from catp_lightning.calibration.statistics import STATISTICS
from catp_lightning.utils.plots import png
from tests.support.reports import calibrated, lines_of, tables, with_evidence, with_heads, write


@pytest.fixture(scope="module")
def promised(tmp_path_factory: pytest.TempPathFactory) -> list[PruningPolicy]:
    file = tmp_path_factory.mktemp("promised") / "policy.json"
    return calibrated(file, keep=[7, 6, 4, 1], max_disagreement=0.6, confidence=0.5)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[PruningPolicy]:
    file = tmp_path_factory.mktemp("refused") / "policy.json"
    return calibrated(file, keep=[4, 2], max_disagreement=0.05, confidence=0.1)


def test_three_lines_say_what_was_chosen_what_it_keeps_and_what_it_cost(policies, tmp_path):
    lines, page = write(policies, tmp_path, 2.0)
    assert [line.split(": ")[:2] for line in lines] == [["catp", name] for name in ("chosen", "keeps", "cost")]
    for line, said in zip(lines, ("Chosen", "Keeps", "Cost"), strict=True):
        assert f"- **{said}**: {line.split(': ', 2)[2]}\n" in page
    for policy, point, tokens in zip(policies, policies[0].evidence["retention"], (6, 4, 2), strict=True):
        assert f"{policy.evidence['chosen']} at keep {policy.keep}" in lines[0]
        low, high = point["interval"]
        assert (
            f"{point['agreement']:.1%} ({low:.1%} to {high:.1%}) with {tokens} of 8 tokens, {against(point)}"
            in lines[1]
        )
    assert f"of {policies[0].evidence['samples']['check']} answers it was not chosen on" in lines[1]
    assert lines[2] == "catp: cost: 12.3 s for 48 samples, 6.2 times the prediction alone"
    assert write(policies, tmp_path)[0][2] == "catp: cost: 12.3 s for 48 samples"


def test_a_control_that_wins_is_called_one(policies, tmp_path):
    ours, theirs = (
        with_evidence(policies[0], control=won, retention=[{**policies[0].evidence["retention"][0], "chosen": name}])
        for name, won in (("catp", False), ("stride", True))
    )
    for policy, line, cell in (
        (ours, "", "catp"),
        (theirs, " (a control: no finding of this calibration beats it)", "stride (a control)"),
    ):
        (chosen, *_), page = write([policy], tmp_path)
        assert chosen == f"catp: chosen: {policy.evidence['chosen']} at keep 0.75{line}"
        assert tables(page, "Budgets")[0][2] == cell


def test_the_page_has_every_budget_and_the_best_candidates_with_all_controls(policies, tmp_path):
    _, page = write(policies, tmp_path)
    assert page.startswith("# Calibration of blip-2\n")
    samples = policies[0].evidence["samples"]
    assert f"The split: {samples['learn']} samples to learn, {samples['check']} samples to check." in page
    for row, point, total in zip(tables(page, "Budgets"), policies[0].evidence["retention"], (6, 4, 2), strict=True):
        assert row[0] == str(point["keep"]) and row[1] == f"{total} of 8" and row[2].startswith(point["chosen"])
        low, high = point["interval"]
        assert row[3:6] == [f"{point['agreement']:.1%}", f"{low:.1%} to {high:.1%}", str(samples["check"])]
        best = point["best_control"]
        assert row[6].startswith(best["verdict"]) and f"{best['name']} ({best['difference']:+.1%}, " in row[6]
    for policy in policies:
        everyone = policy.evidence["candidates"]
        rows = tables(page, f"Candidates at keep {policy.keep}")
        controls = {row["name"] for row in everyone if row["control"]}
        assert [row[0] for row in rows[:SHOWN]] == [row["name"] for row in everyone[:SHOWN]]
        assert {row[0] for row in rows if row[1] == "yes"} == controls > {"random", "stride", "l2-norm"}
        assert f"{len(everyone) - len(rows)} more candidates are not shown; the figures of all {len(everyone)}" in page
        for row, found in zip(rows[:SHOWN], everyone, strict=False):
            choose, check = found["choose"], found["check"]
            said = f"{choose['divergence']:.4f} ± {choose['divergence_error']:.4f}"
            assert row[2:5] == [str(choose["samples"]), said, f"{choose['agreement']:.1%}"]
            assert row[5].startswith(f"{check['agreement']:.1%} (") if check else row[5] == ""
    assert any(row["check"] is None for row in policies[0].evidence["candidates"]), "or the last column proves nothing"
    last = sorted(policies[0].evidence["candidates"], key=lambda row: row["control"])
    _, page = write([with_evidence(policies[0], candidates=last)], tmp_path)
    shown = [row[0] for row in tables(page, "Candidates at keep 0.75")]
    assert shown[SHOWN:] == [row["name"] for row in last if row["control"]], "controls are shown even at the end"


@pytest.mark.slow
def test_agreement_on_perturbed_images_is_a_table_for_each_budget_and_the_worst_is_said(tmp_path):
    policies = calibrated(tmp_path / "policies", keep=[0.5, 2], augment={"dim": lambda pixels: pixels / 3, "b*w": abs})
    lines, page = write(policies, tmp_path)
    for policy in policies:
        rows = tables(page, f"Perturbed images at keep {policy.keep}")
        checked = {row["name"]: row for row in policy.evidence["candidates"] if row["check"]}
        assert rows[0][0] == policy.evidence["chosen"] and {row[0] for row in rows} == checked.keys()
        found = policy.evidence["perturbed"]
        assert list(found) == ["dim", "b*w"]
        for name, control, *shares in rows:
            each = [checked[name]["check"], found["dim"][name], found["b*w"][name]]
            assert shares == [f"{figures['agreement']:.1%}" for figures in each]
            assert control == ("yes" if checked[name]["control"] else "")
        assert len({share for row in rows for share in row[2:]}) > 1, "or this proves nothing"
        worst = min(found, key=lambda name: found[name][policy.evidence["chosen"]]["agreement"])
        share = found[worst][policy.evidence["chosen"]]["agreement"]
        assert f", at worst {share:.1%} ({worst}) on perturbed images" in lines[1]
    assert "| candidate | control | as they are | dim | b\\*w |\n" in page
    metrics = writing._metrics(policies)
    assert metrics["catp/keep-2/perturbed/dim"] == policies[1].evidence["perturbed"]["dim"][rows[0][0]]["agreement"]


def test_a_page_without_perturbations_says_nothing_of_them(policies, tmp_path):
    lines, page = write(policies, tmp_path)
    assert "erturbed" not in page + lines[1] and not any("perturbed" in name for name in writing._metrics(policies))


@pytest.mark.slow
def test_figures_are_valid_files_beside_the_page_and_stale_ones_go(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "png", png)
    _, page = write([with_heads(policy) for policy in policies], tmp_path / "new" / "report")
    folder = tmp_path / "new" / "report"
    captions = {**CAPTIONS, **{one.name: one.caption for one in STATISTICS if one.caption}}
    del captions["front"]  # of budgets that are prices
    assert re.findall(r"!\[[\w ]+\]\((.+)\)", page) == [f"{name}.png" for name in captions]
    assert FIGURES.keys() == CAPTIONS.keys()
    for name, caption in captions.items():
        assert caption in page
        with Image.open(folder / f"{name}.png") as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 100
    assert {file.name for file in folder.iterdir()} == {
        "report.md",
        "report.html",
        *(f"{name}.png" for name in captions),
    }
    _, page = write(policies, folder)  # nothing was selected here
    assert "heads.png" not in page and not (folder / "heads.png").exists()


def test_what_the_probes_found_is_said_in_words(policies, tmp_path):
    _, page = write([with_heads(policies[0])], tmp_path)
    (cross,) = re.findall(r"- cross-attention: (.+)\n", page)
    assert "layer 1 (3.21% ± 0.43% of the variance, chosen again in 80% of the fits" in cross
    assert "3 of 4 heads, which explain 4.56% ± 0.54% of the variance" in cross
    assert "same sign in 60% to 100%" in cross
    assert "- region-attention: nothing; no layer's head scores predict the answers better than chance" in page


def test_where_nothing_was_selected_the_page_says_so(policies, tmp_path):
    assert not any(policies[0].evidence["fitted"][name]["layers"] for name in ("cross-attention", "region-attention"))
    _, page = write(policies, tmp_path)
    assert (
        page.count(": nothing; no layer's head scores predict the answers better than chance on left-out images.") == 2
    )
    assert head_figure(policies) is None
    values = with_heads(policies[0]).to_dict()
    values["evidence"]["fitted"]["cross-attention"]["head_weights"] = [[0.0] * 4]
    without = PruningPolicy.from_dict(values)
    assert head_figure([without]) is None
    assert "but no selection of heads predicts the answers better than chance" in write([without], tmp_path)[1]


def test_a_promise_that_holds_is_said_with_its_steps(promised, tmp_path):
    lines, page = write(promised, tmp_path)
    (policy,) = promised
    promise = policy.evidence["promise"]
    holding = [step for step in promise["steps"] if step["holds"]]
    assert 1 <= len(holding) < 4 and policy.keep == holding[-1]["keep"], "or this proves nothing"
    assert lines[0] == (
        f"catp: chosen: {policy.evidence['chosen']} at keep {policy.keep}"
        + " (a control: no finding of this calibration beats it)" * policy.evidence["control"]
        + ", the smallest budget that keeps the promise"
    )
    images = promise["images"]
    said = f"at most 0.6 of new images disagree, with confidence 0.5 ({holding[-1]['disagreed']} of {images} did)"
    assert lines[1].endswith(said) and lines[1].count("tokens") == 1
    assert f"With confidence 0.5, the policy at keep {policy.keep} answers at most 0.6 of new images" in page
    assert f"tested on {images} images that nothing was decided on" in page
    for row, step in zip(tables(page, "The promise"), promise["steps"], strict=True):
        answers = ["yes" if step[name] else "no" for name in ("tested", "holds")]
        assert row == [str(step["keep"]), f"{step['disagreed']} of {images}", f"{step['bound']:.2%}", *answers]
    assert len(tables(page, "Budgets")) == 4
    (axes,) = retention_figure(promised).axes
    assert lines_of(axes)["promised: 40.0%"][1] == [0.4, 0.4]
    tokens, agreed = lines_of(axes)["stride"]  # measured at the budget of the policy alone: a point, no line
    assert list(tokens) == [policy.keep]
    assert agreed[0] == next(r["check"]["agreement"] for r in policy.evidence["candidates"] if r["name"] == "stride")


@pytest.mark.slow
def test_a_promise_that_no_budget_keeps_is_reported_without_candidates(refused, tmp_path):
    (policy,) = refused
    assert policy.keep == 1.0 and policy.evidence["chosen"] == "no pruning"
    logger = CSVLogger(tmp_path / "logs")
    lines, page = write(refused, tmp_path / "report")
    promise = policy.evidence["promise"]
    first = promise["steps"][0]
    assert lines[0] == "catp: chosen: no pruning: no budget keeps the promise"
    assert lines[1] == (
        f"catp: keeps: all 8 tokens, so every answer; at keep 4 {first['disagreed']} of {promise['images']} images "
        f"disagree, which allows up to {first['bound']:.2%}, above 0.05"
    )
    assert "No budget was found to change at most 0.05 of the answers with confidence 0.1" in page
    assert [row[4] for row in tables(page, "The promise")] == ["no", "no"]
    assert "## Candidates" not in page and layer_figure(refused) is None
    assert re.findall(r"\((.+)\.png\)", page) == ["retention", "slots", "rank_correlation"]
    report(refused, [], tmp_path / "report", [logger], 1.0)  # nothing was measured of a policy that keeps all
    assert not logger.experiment.metrics


def test_the_logged_table_holds_every_candidate(policies):
    for policy in policies:
        rows = candidate_rows(policy)
        assert len(rows) == len(policy.evidence["candidates"])
        for row, found in zip(rows, policy.evidence["candidates"], strict=True):
            named = dict(zip(COLUMNS, row, strict=True))
            assert named["candidate"] == found["name"] and named["samples"] == found["choose"]["samples"]
            assert named["divergence"] == found["choose"]["divergence"]
            check = found["check"] or {"divergence": None, "agreement": None, "interval": (None, None)}
            assert named["checked divergence"] == check["divergence"]
            assert (named["checked agreement"], named["low"], named["high"]) == (check["agreement"], *check["interval"])


def test_the_report_lies_in_the_policys_folder_or_beside_its_file(tmp_path):
    assert report_folder(tmp_path) == tmp_path / "report"
    assert report_folder(tmp_path / "a.json") == tmp_path / "a-report"
