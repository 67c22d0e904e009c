"""Class check for Lightning's two packages, `lightning` and `pytorch_lightning`, which have the same classes twice."""

PACKAGES = ("lightning", "pytorch_lightning")


def is_lightning_instance(thing: object, *names: str) -> bool:
    """True if `thing` is an instance of a Lightning class of one of these names, of either package.

    >>> from lightning.pytorch.callbacks import EarlyStopping
    >>> is_lightning_instance(EarlyStopping("loss"), "EarlyStopping"), is_lightning_instance(print, "EarlyStopping")
    (True, False)
    """
    classes = type(thing).__mro__
    return any(cls.__name__ in names and cls.__module__.partition(".")[0] in PACKAGES for cls in classes)
