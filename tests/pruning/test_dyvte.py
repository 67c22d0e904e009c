"""DyVTE's dropping equals hiding a sample's visual tokens from the layer on at which it lets them leave."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers import DyVTE
from catp_lightning.models import find_family
from tests.support.families import BY_NAME
from tests.support.matrix import exact, generate, scale
from tests.support.oracles import visual_columns
from tests.support.rows import Row
from tests.support.stages import LAYERS, every_model, masked, model_of, stack_of

pytestmark = pytest.mark.usefixtures("no_grad")


def network(features: int, layers: int = LAYERS - 1, seed: int = 0, **settings: Any) -> DyVTE:
    """A network whose likelihoods are far from each other, for different samples and layers."""
    draw = torch.Generator().manual_seed(seed)
    sizes = DyVTE.sizes_for(features, 8, layers)
    shapes = {name: tuple(sizes[one] for one in names) for name, names in DyVTE.shapes.items()}
    return DyVTE(**settings).with_weights({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()})


def normed(rows: Tensor) -> Tensor:
    return F.layer_norm(rows, rows.shape[-1:])


@pytest.mark.slow
@every_model
def test_dropping_equals_hiding_from_the_layer_on_where_each_sample_leaves(row: Row) -> None:
    model, inputs = model_of(row), row.inputs()
    features = int(find_family(model).decoder_config.hidden_size)
    stages, tokens = tuple(range(1, LAYERS)), row.oracle.tokens(inputs)
    likelihoods = likelihoods_of(row, model, inputs, network(features))
    values = likelihoods.max(1).values.sort().values
    scorer = network(features, threshold=float(values[:2].mean()))  # one sample keeps its tokens to the end
    leaves = likelihoods >= scorer.threshold
    with prune(model, PruningPolicy.of(scorer)) as pruning:
        prefill = model(**inputs).logits
        read = pruning.last.tokens_per_layer  # type: ignore[union-attr]
        new, steps = generate(row, model, inputs, 10)
    gone = leaves.cumsum(1) > 0
    assert gone[:, -1].sum() == len(tokens) - 1
    keeps = [tokens & ~gone[:, stage, None] for stage in range(len(stages))]
    layers = torch.where(leaves.any(1), leaves.int().argmax(1) + 1, LAYERS)
    torch.testing.assert_close(read, tokens.sum(1) * layers.float() / LAYERS)
    with masked(row, model, inputs, stages, keeps):
        expected = model(**inputs).logits
        expected_new, expected_steps = generate(row, model, inputs, 10)
    rows, atol = row.oracle.compared(inputs, keeps[-1]), row.tolerance() * scale(expected)
    exact(prefill[rows], expected[rows], atol=atol)
    exact(steps, expected_steps, atol=atol)
    assert torch.equal(new, expected_new)


def likelihoods_of(row: Row, model: Any, inputs: dict[str, Tensor], scorer: DyVTE) -> Tensor:
    """Likelihoods [B, layers] of the unpruned run's text rows, by the equation."""
    w = {name: weight.double() for name, weight in scorer.weights_like(torch.zeros(1)).items()}
    entered: list[Tensor] = []
    undo = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in stack_of(row, model).layers[1:]
    ]
    model(**inputs, use_cache=False)
    [one.remove() for one in undo]
    visual, found = visual_columns(inputs), []
    text = inputs["attention_mask"].bool() & ~visual & (visual.cumsum(1) > 0)
    text |= inputs["attention_mask"].bool() & ~visual & ~text.any(1, keepdim=True)
    for sample, own in enumerate(text):
        for stage, states in enumerate(entered):
            rows = states[sample][own]
            both = torch.cat([normed(rows[-1]), normed(rows.mean(0))])
            hidden = F.gelu(w["see"] @ both + w["bias"][stage])
            found.append((hidden @ w["out"][stage] + w["offset"][stage]).sigmoid())
    return torch.stack(found).view(len(text), len(entered))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_at_the_ends_all_leave_at_the_first_layer_or_none_leaves(threshold: float) -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    family = find_family(model)
    scorer = network(int(family.decoder_config.hidden_size), family.depth - 1, threshold=threshold)
    with prune(model, PruningPolicy.of(scorer)) as pruning:
        logits = model(**inputs).logits
    kept, tokens = pruning.keep, row.oracle.tokens(inputs)
    assert kept is not None and torch.equal(kept, tokens if threshold else torch.zeros_like(tokens))
    if threshold:
        assert torch.equal(logits, model(**inputs).logits)


def test_a_network_of_another_model_or_none_is_refused() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    family = find_family(model)
    features, layers = int(family.decoder_config.hidden_size), family.depth - 1
    with pytest.raises(PruningError, match="'dyvte' has no weights"), prune(model, PruningPolicy("dyvte")):
        pass
    for other, says in (
        (network(features, layers + 1), f"trained for {layers + 1} layers .* this model has {layers} from layer 1 on"),
        (network(features // 2, layers), f"trained for rows of {features // 2} dimensions"),
    ):
        with prune(model, PruningPolicy.of(other)), pytest.raises(ValueError, match=says):
            model(**inputs)
    with pytest.raises(PolicyError, match="scorer 'dyvte'"):
        PruningPolicy("dyvte", {"weights": "AAAA"})


def test_a_prompt_without_text_gives_finite_logits() -> None:
    states = torch.zeros(2, 3, 12, dtype=torch.float64)
    seen = Observation(
        torch.ones(2, 4, dtype=torch.bool), {}, {Signal.TEXT_STATES: states}, text=torch.zeros(2, 3, dtype=torch.bool)
    )
    assert network(12).logits(seen, 1).isfinite().all()
