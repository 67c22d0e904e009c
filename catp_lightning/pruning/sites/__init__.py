"""Drop visual tokens inside a running model, unnoticed by the code that calls it: one file for each place."""

from catp_lightning.errors import PruningError
from catp_lightning.models import Family
from catp_lightning.pruning.sites.base import Decide, PruningSite, Report, SiteSettings, ignored
from catp_lightning.pruning.sites.cross_attention import PruneCrossAttention
from catp_lightning.pruning.sites.decoder_input import PruneAtDecoderInput
from catp_lightning.pruning.sites.decoder_layers import PruneAtDecoderLayers
from catp_lightning.pruning.sites.encoder_input import PruneAtEncoderInput
from catp_lightning.pruning.sites.encoder_layers import PruneAtEncoderLayers

SITES: tuple[type[PruningSite], ...] = (
    PruneAtDecoderInput,
    PruneAtDecoderLayers,
    PruneAtEncoderInput,
    PruneAtEncoderLayers,
    PruneCrossAttention,
)
"""Places where tokens leave, one file each."""


def site_of(family: Family, decide: Decide, settings: SiteSettings, report: Report = ignored) -> PruningSite:
    """Return the place where visual tokens leave a family's model, where its language model reads them.

    Args:
        family: bound to the model.
        decide: returns the selection of a prompt's visual tokens.
        settings: settings of the place.
        report: as in `PruningSite`.

    Raises:
        PruningError: tokens are to leave inside a decoder, but none reads visual tokens as rows of its own.
    """
    for site in SITES:
        if (site.reads, site.inside) == (family.reads, any(settings.stages)):
            return site(family, decide, settings, report)
    raise PruningError(
        f"The policy drops tokens inside a decoder (layers {', '.join(str(at) for at in settings.stages if at)}); "
        f"{type(family.model).__name__} reads them by {family.reads}. Choose another scorer; docs/methods.md lists "
        "them."
    )


__all__ = [
    "SITES",
    "Decide",
    "PruneAtDecoderInput",
    "PruneAtDecoderLayers",
    "PruneAtEncoderInput",
    "PruneAtEncoderLayers",
    "PruneCrossAttention",
    "PruningSite",
    "SiteSettings",
    "site_of",
]
