"""VLMEvalKit's own models pruned by a policy: `python -m catp_lightning.integrations.vlmevalkit --policy ...`."""
