"""Replays: recorded prompts are answered again with other tokens kept."""
