"""Contrast of two colours, as WCAG 2.2 defines it: from 1 to 21."""

from matplotlib.colors import to_rgb

GROUNDS = ("white", "#f4f4f4")
"""Grounds of figures: of files, and of pages of HTML on a dark screen."""


def contrast(one: object, other: object) -> float:
    """Return (L1 + 0.05) / (L2 + 0.05) of the relative luminances of two colours, the lighter one first."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: object) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
