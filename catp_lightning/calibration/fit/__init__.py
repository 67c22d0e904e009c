"""Fitting: random subsets of tokens are probed, and token positions, layers and heads are fitted to their sums."""
