"""DyVTE: a small network reads the text rows and says at which layer all visual tokens leave (2411.19628)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.trained import Trained, drawn, normed
from catp_lightning.methods.weights import Shapes, Weights


@dataclass(frozen=True)
class DyVTE(Trained):
    """Drops all visual tokens of a sample at the first layer where the network expects its answer to stay the same.

    At the entry of layer l, from `first` on, with r the last text row of the prompt and m the mean of its text rows,

        p_l = sigmoid(out_l . gelu(see [LN(r), LN(m)] + bias_l) + offset_l)

    and all visual tokens of the sample leave if p_l is at least `threshold`. All scores are 0, and `keep` is ignored,
    except that keep 1.0 is the unpruned model; `threshold` is what sets the price. The paper trains a network for the
    status of the text rows, on whether the answer is right when tokens leave; here it learns whether the unpruned
    model's own answer stays, so that no labels are needed, and all layers share the first matrix.

    Attributes:
        threshold: least likelihood of the same answer, in [0, 1], at which tokens leave.
        first: first layer at whose entry they may leave, at least 1.

    Raises:
        ValueError: `threshold` or `first` is not allowed, or the weights are damaged.
    """

    shapes: ClassVar[Shapes] = {
        "see": ("width", "states"),
        "bias": ("layers", "width"),
        "out": ("layers", "width"),
        "offset": ("layers",),
    }

    threshold: float = 0.9
    first: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it is a likelihood, in [0, 1].")
        if self.first < 1:
            raise ValueError(f"first is {self.first}; the first layer reads visual tokens, so it is at least 1.")

    @property
    def needs(self) -> Needs:
        return {Signal.TEXT_STATES: None}

    @property
    def adaptive(self) -> bool:
        return True

    def stages(self, depth: int) -> tuple[int, ...]:
        return tuple(range(self.first, depth))

    def score(self, seen: Observation) -> Tensor:
        return torch.zeros(seen.valid.shape, dtype=torch.float32, device=seen.valid.device)

    def stage_counts(self, keep: int | float, tokens: Tensor, stage: int, stages: int, seen: Observation) -> Tensor:
        """Return `tokens`, or 0 where the network says that they leave, whatever `keep` is: int64 [B].

        Raises:
            ValueError: the network was trained for a model of another depth or other dimensions.
        """
        if self.sizes["layers"] != stages:
            raise ValueError(
                f"the network was trained for {self.sizes['layers']} layers at which tokens may leave; this model has "
                f"{stages} from layer {self.first} on. Train one on this model."
            )
        likelihood = self.logits(seen, stage).sigmoid()
        return tokens.where(likelihood < self.threshold, 0)

    def logits(self, seen: Observation, stage: int, weights: Weights | None = None) -> Tensor:
        """Return the logit of the likelihood that each sample's answer stays: float32 or float64 [B].

        Gradients reach `weights`; None: the method's own.

        Raises:
            ValueError: the weights are for a model of other dimensions.
        """
        rows, there = seen[Signal.TEXT_STATES], seen.text
        assert there is not None  # it comes with the rows
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        weights = self.weights_like(rows) if weights is None else weights
        if weights["see"].shape[1] != 2 * rows.shape[-1]:
            raise ValueError(
                f"the network was trained for rows of {weights['see'].shape[1] // 2} dimensions; this model's have "
                f"{rows.shape[-1]}. Train one on this model."
            )
        count = there.sum(1)
        last = rows[torch.arange(len(rows), dtype=torch.int64, device=rows.device), (count - 1).clamp(min=0)]
        mean = (rows * there[..., None]).sum(1) / count[:, None].clamp(min=1)
        with torch.autocast(rows.device.type, enabled=False):
            read = F.linear(torch.cat([normed(last), normed(mean)], 1), weights["see"], weights["bias"][stage])
            return F.gelu(read) @ weights["out"][stage] + weights["offset"][stage]

    @classmethod
    def sizes_for(cls, features: int, width: int, layers: int) -> dict[str, int]:
        """Return the sizes of the weights for a model of `features` dimensions, with `layers` to leave at."""
        return {"states": 2 * features, "width": width, "layers": layers}

    @classmethod
    def initial(cls, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        layers, width = sizes["layers"], sizes["width"]
        nothing = torch.zeros(layers, width, dtype=torch.float32, device="cpu")
        return {
            "see": drawn((width, sizes["states"]), generator),
            "bias": nothing,
            "out": nothing.clone(),
            "offset": nothing[:, 0].clone(),
        }
