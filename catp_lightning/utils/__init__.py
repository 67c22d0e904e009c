"""Helpers that know nothing of models and tokens: files, hooks, hashes, progress, messages."""
