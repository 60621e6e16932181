"""How each kind of head is created, trained, evaluated and saved: all kinds that can be trained."""

from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.options import HeadOptions
from redrafter_mlx.training.recipes.dflash import DFlash
from redrafter_mlx.training.recipes.eagle3 import Eagle3
from redrafter_mlx.training.recipes.medusa import Medusa
from redrafter_mlx.training.recipes.recipe import Recipe
from redrafter_mlx.training.recipes.recurrent import Recurrent

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (Recurrent, Medusa, Eagle3, DFlash)
}


def recipe_for(target: Target, options: HeadOptions) -> Recipe:
    """The recipe of the kind of head that is asked for."""
    return RECIPES[options.head](target, options)
