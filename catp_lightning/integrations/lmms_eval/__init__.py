"""Plug-in of lmms-eval: `lmms-eval --model catp` runs its own models pruned by a policy."""

from typing import Any


def manifest() -> Any:
    """Return what lmms-eval registers: its entry point in the group `lmms_eval.models` calls this."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = f"{__name__}.model"
    return ModelManifest("catp", simple_class_path=f"{classes}.SimpleCatp", chat_class_path=f"{classes}.Catp")
