"""Errors a person can act on: what was wrong, the value, what is allowed, what to do next."""


class PolicyError(ValueError):
    """A policy, or a file that should hold one, is wrong, damaged, or made for another model."""


class DataError(ValueError):
    """A data set is incomplete or damaged: a file, an image or an id is missing or unreadable."""


class PruningError(RuntimeError):
    """A model, a call or an option cannot be pruned exactly; nothing is ever left unpruned in silence."""
