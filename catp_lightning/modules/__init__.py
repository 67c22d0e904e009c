"""LightningModules: a wrapper that prunes, and a ready module for Hugging Face models."""
