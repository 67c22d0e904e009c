"""Examples of a sweep's page: what methods keep of a few images and what they answer, clicked through in Chromium."""

import json
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from catp_lightning.data import shipped
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.evaluation.sweep.examples import EACH, examples_of, shown_jobs
from catp_lightning.evaluation.sweep.jobs import Outcome
from catp_lightning.evaluation.sweep.methods import Job
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.plots import kept_tokens
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import prune
from tests.support.browsers import WIDTHS, Opened, chromium, fits_and_asks_nothing, opening, texts
from tests.support.sweeps import outcome

FULL = Outcome(list(range(6)), ["a"] * 6, batches=[4, 2])


def page(swept: Path) -> Path:
    return swept / "digits_blip2/table.html"


def examples(swept: Path) -> list[dict[str, Any]]:
    """The examples in the page."""
    found = re.findall(
        r'data-kind="([^"]*)">\s*<img src="data:image/jpeg;base64,([^"]+)".*?<dd dir="auto">(.*?)</dd>'
        r'.*?<dd dir="auto">(.*?)</dd>.*?<dd dir="auto">(.*?)</dd>',
        page(swept).read_text(),
        re.DOTALL,
    )
    return [dict(zip(("kind", "picture", "question", "unpruned", "pruned"), one, strict=True)) for one in found]


def test_pictures_and_answers_are_those_of_the_method_on_questions_of_the_comparison(swept: Path) -> None:
    place = swept / "digits_blip2/data/test"
    data = VQADataModule(str(shipped("digits_blip2")), test=VQASplit.of_scenes(place), batch_size=64)
    module = VQAModule(str(shipped("digits_blip2")))
    (batch,) = data.test_dataloader()
    asked = [one["question"] for one in json.loads((place / "questions.json").read_text())["questions"]]
    full = outcome(swept, "unpruned.json")["answers"]
    with torch.no_grad(), prune(module, PruningPolicy("fastv", keep=2), show=True) as pruning:
        pruned = module.answer(batch)
    drawn = [kept_tokens(shown).jpeg() for shown in pruning.shown]
    own = [one for one in examples(swept) if one["kind"].startswith("fastv, keep 2:")]
    assert len(own) > 1
    for one in own:
        at = drawn.index(b64decode(one["picture"]))
        assert (one["unpruned"], one["pruned"]) == (full[at], pruned[at])
        words = re.findall(r"[a-z]+", asked[at].lower())
        assert re.findall(r"[a-z]+", one["question"].lower()) == ["question", *words, "short", "answer"]
        assert one["kind"].endswith("same answer" if full[at] == pruned[at] else "other answer")


def test_those_that_disagree_come_first_and_all_that_are_wanted_are_there(swept: Path) -> None:
    full = outcome(swept, "unpruned.json")["answers"]
    kinds = [one["kind"] for one in examples(swept)]
    for keep in ("0.5", "2"):
        for title, names in (("fastv", ["fastv"]), ("random (3 seeds)", [f"random-seed-{n}" for n in range(3)])):
            drawn = [outcome(swept, f"{name}-keep-{keep}.json")["answers"] for name in names]
            same = max(sum(one == other for one, other in zip(own, full, strict=True)) for own in drawn)
            wanted = [("other", min(EACH, len(full) - same)), ("same", min(EACH, same))]
            own = [kind for kind in kinds if kind.startswith(f"{title}, keep {keep}:")]
            assert own == [f"{title}, keep {keep}: {kind} answer" for kind, count in wanted for _ in range(count)]
            assert title == "fastv" or len(set(own)) == 2, "or the order proves nothing"
        assert len({kind.split(", keep")[0] for kind in kinds if f"keep {keep}:" in kind}) == 2, (
            "another method as well"
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(params=WIDTHS)
def opened(request: pytest.FixtureRequest, browser: Any, swept: Path) -> Iterator[Opened]:
    with opening(browser, page(swept), request.param) as found:
        yield found


@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desk_and_its_examples_are_clicked_through(opened: Opened, swept: Path) -> None:
    fits_and_asks_nothing(opened, page(swept))
    every, seen = examples(swept), opened.page.locator("figure.example:visible")
    for label in texts(opened.page, "#examples button[data-kind]"):
        kind, count = re.fullmatch(r"(.+) \((\d+)\)", label).groups()
        opened.page.locator(f'#examples button[data-kind="{kind}"]').click()
        own = [one for one in every if one["kind"] == kind]
        assert len(own) == int(count)
        for one in own:
            assert seen.count() == 1
            assert seen.locator("dd").all_text_contents() == [one["question"], one["unpruned"], one["pruned"]]
            assert seen.locator("img").evaluate("one => one.decode().then(() => one.naturalWidth)") > 100
            opened.page.locator("button[data-step='1']").click()
    box = opened.page.locator("#examples .kinds").bounding_box()
    assert box["height"] <= 200, "many kinds do not push the image off the screen"


def outcomes(**answers: str) -> dict[Job, Outcome]:
    """An outcome for each title, with one letter for each answer, all at one budget."""
    policy = PruningPolicy("stride", keep=4)
    return {Job(title, title, policy): Outcome(list(range(6)), list(own)) for title, own in answers.items()}


def test_the_reference_is_shown_beside_the_best_other_method() -> None:
    found = outcomes(low="bbbbba", reference="abbbbb", high="aabbbb", higher="aaabbb")
    assert [job.title for job in shown_jobs(FULL, found, "reference")] == ["reference", "higher"]
    assert [job.title for job in shown_jobs(FULL, outcomes(only="bbbbba"), "only")] == ["only"]


def asked_again(full: Outcome, predict: Any) -> list[Any]:
    module = VQAModule(str(shipped("digits_blip2")))
    reading = SimpleNamespace(module=module, predict=predict)
    found = outcomes(reference="abbbbb")
    return examples_of(reading, SimpleNamespace(), [None, None], full, found, "reference", lambda: module)


def test_where_asking_again_fails_there_is_a_warning_and_no_example() -> None:
    def fails(*_: Any) -> None:
        raise OSError("the images are gone")

    with pytest.warns(UserWarning, match=r"no examples, for they failed \(OSError: the images are gone\)"):
        assert asked_again(FULL, fails) == []


def test_an_unpruned_run_of_an_earlier_version_has_no_examples() -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    assert asked_again(Outcome(FULL.question_ids, FULL.answers), never) == []
