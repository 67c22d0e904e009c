"""What the plug-in of lmms-eval makes of `policy=` and `keep=`; lmms-eval itself is not needed."""

from pathlib import Path

import pytest

from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.integrations.lmms_eval.asked import asked_policy
from tests.support.models import random_blip2


@pytest.mark.parametrize("given", ["policy.json", "folder", None])
def test_a_budget_of_one_is_the_unpruned_model_whatever_policy_is_given(tmp_path: Path, given: str | None) -> None:
    PruningPolicy("stride", keep=0.5).save(tmp_path / "policy.json")
    for keep in (0.5, 0.25):
        PruningPolicy("stride", keep=keep).save(tmp_path / f"folder/keep-{keep}.json")
    model, inputs = random_blip2()
    with prune(model, asked_policy(None if given is None else tmp_path / given, 1.0)) as pruning:
        model(**inputs)
    assert pruning.keep.all()


def test_other_budgets_are_those_that_there_are_policies_for(tmp_path: Path) -> None:
    file, folder = tmp_path / "policy.json", tmp_path / "folder"
    PruningPolicy("stride", keep=0.5).save(file)
    for keep in (0.25, 1):  # 1 is a number of tokens
        PruningPolicy("stride", keep=keep).save(folder / f"keep-{keep}.json")
    assert asked_policy(file, None) == asked_policy(file, 0.5) == PruningPolicy("stride", keep=0.5)
    assert [asked_policy(folder, keep).keep for keep in (0.25, 1)] == [0.25, 1]
    with pytest.raises(PolicyError, match=r"is for keep=.*0\.5.*, not 0\.25"):
        asked_policy(file, 0.25)
    with pytest.raises(PolicyError, match=r"has no policy=: .* keep=1.0"):
        asked_policy(None, 0.25)
