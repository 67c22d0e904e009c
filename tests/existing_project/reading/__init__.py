"""Questions about pictures, answered by a small BLIP-2."""
