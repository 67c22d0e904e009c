"""At which layers of a decoder tokens can leave, and which layers have run by then."""

from collections.abc import Iterator

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import BY_LAYER, Needs
from catp_lightning.models.base import Family
from catp_lightning.prompt.attention import PREFIX, SUPPORTED
from catp_lightning.pruning.sites.base import SiteSettings


def layers_read(needs: Needs, stage: int) -> Iterator[int]:
    """Yield the layers whose attention is read at a stage, the entry of layer `stage`.

    Raises:
        PruningError: a layer is read that has not run by then.
    """
    for signal in needs.keys() & BY_LAYER:
        for layer in needs[signal] or range(stage):
            if not -stage <= layer < stage:
                raise PruningError(
                    f"The policy reads layer {layer} of the decoder where tokens leave at layer {stage}: by then "
                    f"layers 0 to {stage - 1} have run. Name one of those, or -1 for the last of them."
                )
            yield layer % stage


def layers_looked_at(settings: SiteSettings) -> list[int]:
    """Return the layers whose attention is read at any stage, ascending.

    Raises:
        PruningError: a layer is read that has not run by then.
    """
    needs = settings.by_stage or (settings.needs,) * len(settings.stages)
    inside = [(own, at) for own, at in zip(needs, settings.stages, strict=True) if at]
    return sorted({layer for own, at in inside for layer in layers_read(own, at)})


def refuse_stages(family: Family, settings: SiteSettings) -> None:
    """Raise PruningError if tokens cannot leave a family's decoder at the stages that are set."""
    config, depth = family.decoder_config, family.depth
    stages = settings.stages[1:] if settings.stages[:1] == (0,) else settings.stages  # 0 is the decoder's input
    name = type(family.decoder).__name__
    if not stages or list(stages) != sorted({*stages} & {*range(1, depth)}):
        raise PruningError(
            f"Tokens cannot leave at the layers {list(settings.stages)} of {name}, which has {depth}: give ascending "
            f"numbers from 1 to {depth - 1}."
        )
    if settings.compact:
        raise PruningError(
            f'positions="compact" is not possible where tokens leave at layer {stages[0]}: the layers before it have '
            'used the positions. Use positions="original".'
        )
    types = {*(getattr(config, "layer_types", None) or ())}
    if other := types - {"full_attention", "sliding_attention"}:
        raise PruningError(
            f"{name} has layers of type {', '.join(sorted(other))}; tokens can leave only inside a decoder whose "
            "layers have full or sliding attention. Choose a scorer that drops tokens before the decoder."
        )
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "hidden_size_per_layer_input", 0):
        raise PruningError(
            f"The layers of {name} read keys that earlier layers cached, or embeddings of each token anew: tokens can "
            "leave only before all of them. Choose a scorer that drops tokens before the decoder."
        )
    if str(config._attn_implementation).removeprefix(PREFIX) not in SUPPORTED:
        raise PruningError(
            f"{name} has attn_implementation={config._attn_implementation!r}, whose masks cannot be shortened. Load "
            f"the model with one of {', '.join(SUPPORTED)}."
        )
