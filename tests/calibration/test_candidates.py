"""Candidates have names of their own, and controls are known."""

from catp_lightning.calibration.search.candidate import Candidate


def test_candidates_have_names_of_their_own_and_controls_are_known(candidates: list[Candidate]) -> None:
    names = [candidate.name for candidate in candidates]
    assert len(set(names)) == len(names)
    assert {candidate.name for candidate in candidates if candidate.control} == {
        "l2-norm", "position", "stride", "random", "divprune", "diversity of outputs", "diversity of cross-attention",
    }  # fmt: skip
    references = {candidate.name for candidate in candidates if candidate.reference and not candidate.control}
    assert references == {"catp layer 0", "catp layer 1"}
    assert {"fixed set", "slots", "cross-attention heads", "region-attention heads and slots"} <= set(names)
    args = [(c.scorer, repr(c.scorer_args), c.selector, repr(c.selector_args)) for c in candidates]
    assert len(set(args)) == len(args), "no rule competes twice"
