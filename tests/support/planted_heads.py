"""Probes of a model whose heads and slots are planted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from catp_lightning.calibration.fit.layers import LayerChoice, choose_layers
from catp_lightning.calibration.fit.sums import FoldSums, ProbeSums
from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.settings import DEFAULTS

FOLDS = DEFAULTS.folds


HEADS, SLOTS, TOKENS, PROBES, BATCH = 16, 8, 16, 16, 40
EXACT = Tolerance(0.0)
LAYERS = [list(range(first, first + 4)) for first in range(0, HEADS, 4)]
SLOT_COLUMNS = range(HEADS, HEADS + SLOTS)
SLOT_WORTH = np.linspace(-1, 1, SLOTS)
SAME_LAYER, OTHER_LAYER = {4: 1.0, 5: 0.6, 6: -0.8}, {4: 1.0, 5: 0.6, 11: -0.8}


def found_layers(
    sums: FoldSums, layers: Sequence[Sequence[int]], slots: Sequence[int] = (), ties: Tolerance = EXACT
) -> LayerChoice:
    return choose_layers(sums, layers, slots, ties)


@dataclass(frozen=True)
class Draw:
    """Probes of a planted model: their sums, and the centred rows themselves."""

    sums: FoldSums
    rows: np.ndarray  # [N, HEADS + SLOTS]
    y: np.ndarray  # [N]
    fold: np.ndarray  # [N]


def sums_of(*parts: ProbeSums) -> FoldSums:
    """The sums of several processes, added as their declared reduction adds them."""
    whole = ProbeSums(parts[0].moment.shape[1])
    for name in ("gram", "moment", "squares", "rows"):
        setattr(whole, name, sum(getattr(part, name) for part in parts))
    return whole.compute()


def batches(
    seed: int, worth: dict[int, float], *, slot_worth: np.ndarray | None = None, noise: float = 2.0, lean: float = 0.0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Three batches of fold [B], rows [P, B, HEADS + SLOTS] and gain [P, B].

    Half of the tokens of every sample are kept at random. The scores of a token share a component among heads, as real
    heads agree; `lean` makes the scores of head 0 follow the token's slot.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([worth.get(head, 0.0) for head in range(HEADS)], dtype=torch.float64)
    slot = torch.arange(TOKENS) % SLOTS
    made = []
    for _ in range(3):
        head_scores = torch.randn(BATCH, TOKENS, HEADS, generator=generator, dtype=torch.float64)
        head_scores = head_scores + 0.5 * torch.randn(BATCH, TOKENS, 1, generator=generator, dtype=torch.float64)
        head_scores[:, :, 0] += lean * torch.from_numpy(SLOT_WORTH)[slot]
        head_scores = (head_scores - head_scores.mean(1, keepdim=True)) / head_scores.std(1, keepdim=True)
        draws = torch.rand(PROBES, BATCH, TOKENS, generator=generator)
        kept = (draws.argsort(-1).argsort(-1) < TOKENS // 2).double()
        heads = torch.einsum("pbt,bth->pbh", kept, head_scores)
        slots = kept.reshape(PROBES, BATCH, TOKENS // SLOTS, SLOTS).sum(2)
        level = 3 * torch.randn(BATCH, generator=generator, dtype=torch.float64)  # some answers are surer than others
        gain = heads @ weights + level + noise * torch.randn(PROBES, BATCH, generator=generator, dtype=torch.float64)
        if slot_worth is not None:
            gain = gain + slots @ torch.from_numpy(slot_worth)
        fold = torch.randint(0, FOLDS, (BATCH,), generator=generator)
        made.append((fold, torch.cat([heads, slots], -1), gain))
    return made


def draw(seed: int, worth: dict[int, float], **settings: object) -> Draw:
    metric, parts = ProbeSums(HEADS + SLOTS), batches(seed, worth, **settings)
    for batch in parts:
        metric.update(*batch)
    rows = np.concatenate([(rows - rows.mean(0)).flatten(0, 1).numpy() for _, rows, _ in parts])
    y = np.concatenate([(gain - gain.mean(0)).flatten().numpy() for _, _, gain in parts])
    fold = np.concatenate([fold.expand(PROBES, -1).flatten().numpy() for fold, _, _ in parts])
    return Draw(sums_of(metric), rows, y, fold)


def scaled(sums: FoldSums, column: int, factor: float) -> FoldSums:
    """The sums had the column come in another unit."""
    units = np.ones(sums.moment.shape[1])
    units[column] = factor
    return replace(sums, gram=sums.gram * units * units[:, None], moment=sums.moment * units)
