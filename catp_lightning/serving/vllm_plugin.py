"""Entry point of vLLM's plug-ins: architectures that prune images by a policy, beside vLLM's own."""

MODELS = "catp_lightning.serving.vllm_models"
ARCHITECTURES = (
    "CatpLlavaForConditionalGeneration",
    "CatpQwen2_5_VLForConditionalGeneration",
    "CatpQwen3VLForConditionalGeneration",
)
"""Names that `--hf-overrides '{"architectures": [...]}'` takes, and those of their classes."""


def register() -> None:
    """Register the architectures; vLLM calls this in each of its processes, and may do so again.

    Nothing changes for other models: they are used only where an architecture is named.
    """
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, f"{MODELS}:{name}")
