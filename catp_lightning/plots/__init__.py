"""Pictures of what is kept: one function each, drawn from what `prune(model, policy, show=True)` records.

Example::

    with prune(model, policy, show=True) as pruning:
        model.generate(**batch)
    plots.kept_tokens(pruning.shown[0]).save("kept.png")  # of the first sample; a notebook shows it by itself
"""

from catp_lightning.plots.kept import kept_tokens
from catp_lightning.plots.merged import merged_tokens
from catp_lightning.plots.picture import Picture
from catp_lightning.plots.scores import score_map
from catp_lightning.plots.side_by_side import by_budget, by_layer

__all__ = ["Picture", "by_budget", "by_layer", "kept_tokens", "merged_tokens", "score_map"]
