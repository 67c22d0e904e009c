"""Recipes: published settings of models, data sets and budgets, as configurations of a sweep."""

from catp_lightning.evaluation.recipes.recipe import Published, Recipe, Task, names, read

__all__ = ["Published", "Recipe", "Task", "names", "read"]
