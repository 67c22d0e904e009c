"""Families of models: where things are in each kind of Hugging Face model, one file a family."""

from catp_lightning.models.base import Family
from catp_lightning.models.find import FAMILIES, find_family

__all__ = ["FAMILIES", "Family", "find_family"]
