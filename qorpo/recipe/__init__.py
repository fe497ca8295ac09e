"""A run, written down: the recipe's keys with their defaults and bounds, and how a YAML file becomes one.

`load_recipe` reads, `resolve` replaces every `auto` by what it stands for, `Recipe.save` writes it down again.
Every problem of a recipe is found before any is reported, in one RecipeError. Paths are kept as they were written,
relative to the folder qorpo is started in. No torch here, so the command line answers at once.
Begin with keys.py and objectives.py; values.py has the kinds of value, reading.py the messages, resolving.py the
meanings of auto.
"""

from qorpo.recipe.keys import (
    FIELDS,
    DataRecipe,
    LoraRecipe,
    MemoryRecipe,
    ModelRecipe,
    Recipe,
    SourceRecipe,
    TrainRecipe,
)
from qorpo.recipe.objectives import OBJECTIVES, ObjectiveRecipe
from qorpo.recipe.reading import load_recipe
from qorpo.recipe.resolving import resolve

__all__ = [
    "FIELDS",
    "OBJECTIVES",
    "DataRecipe",
    "LoraRecipe",
    "MemoryRecipe",
    "ModelRecipe",
    "ObjectiveRecipe",
    "Recipe",
    "SourceRecipe",
    "TrainRecipe",
    "load_recipe",
    "resolve",
]
