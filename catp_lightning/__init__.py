"""Calibrated visual-token pruning for vision-language models in PyTorch Lightning."""

from typing import TYPE_CHECKING

from catp_lightning.errors import DataError, PolicyError, PruningError

if TYPE_CHECKING:
    from catp_lightning.callbacks import AnswerWriter, CrossAttentionCalibration, TokenPruning
    from catp_lightning.modules.compressor import CompressorTraining
    from catp_lightning.modules.pruned import PrunedModule
    from catp_lightning.modules.vqa import VQAModule
    from catp_lightning.policy import PruningPolicy, Stage
    from catp_lightning.pruning import Pruning, prune

    __version__: str
else:
    # Modules that need torch are imported when their names are first used: `catp --help` and its like do not need them.
    _PLACES = {
        "AnswerWriter": "callbacks",
        "CompressorTraining": "modules.compressor",
        "CrossAttentionCalibration": "callbacks",
        "TokenPruning": "callbacks",
        "PrunedModule": "modules.pruned",
        "PruningPolicy": "policy",
        "Stage": "policy",
        "Pruning": "pruning",
        "prune": "pruning",
        "VQAModule": "modules.vqa",
    }

    _ROOMS = (
        "callbacks",
        "calibration",
        "data",
        "methods",
        "metrics",
        "models",
        "modules",
        "plots",
        "policy",
        "pruning",
        "serving",
    )

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _PLACES:
            found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        elif name in _ROOMS:
            found = import_module(f"{__name__}.{name}")
        elif name == "__version__":
            found = _version()
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def _version() -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("catp-lightning")
        except PackageNotFoundError:  # read from its sources, not installed
            return "unknown"

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "AnswerWriter",
    "CompressorTraining",
    "CrossAttentionCalibration",
    "DataError",
    "PolicyError",
    "PrunedModule",
    "Pruning",
    "PruningError",
    "PruningPolicy",
    "Stage",
    "TokenPruning",
    "VQAModule",
    "prune",
]
