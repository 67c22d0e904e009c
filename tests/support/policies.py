"""Policies that many tests prune by."""

from catp_lightning import PruningPolicy

HALF = PruningPolicy(scorer="catp", keep=0.5)
QUARTER = HALF.with_keep(0.25)
CATP = PruningPolicy(scorer="catp", scorer_args={"image_weight": "received"}, keep=0.5)
DPP = PruningPolicy(
    scorer="catp",
    scorer_args={"layers": [0, -1], "head_weights": [[1.0, -0.5], [0, 2]]},
    selector="dpp",
    selector_args={"relevance": -1.5, "similarity": "outputs"},
    keep=0.25,
    model={"type": "blip-2", "name": "x", "visual_tokens": 32},
    evidence={"chosen": "something"},
)
