"""How long pruned runs take against a plain decoder on an input already that short; `python -m benchmarks.bench`."""
