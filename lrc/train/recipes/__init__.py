"""Recipes: methods that hang on training; one file each, found through the registry."""

from typing import Any

from lrc.spec.registry import Rule
from lrc.train.recipes.base import Context, Own, Recipe, RecipeOptions, recipe
from lrc.train.recipes.flexora import flexora
from lrc.train.recipes.loraprune import loraprune
from lrc.train.recipes.lr2vq import lr2vq
from lrc.train.recipes.maestro import maestro
from lrc.train.recipes.recover import recover
from lrc.train.recipes.sltrain import sltrain
from lrc.train.recipes.sora import sora

BUILTIN: tuple[Rule[Any, Any], ...] = (flexora, loraprune, lr2vq, maestro, recover, sltrain, sora)

__all__ = ["BUILTIN", "Context", "Own", "Recipe", "RecipeOptions", "recipe"]
