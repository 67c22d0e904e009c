"""A policy's decision as two pure functions, for servers that ask how many tokens stay before which ones."""

from catp_lightning.serving.contract import check_servable, kept_count, kept_tokens

__all__ = ["check_servable", "kept_count", "kept_tokens"]
