"""FP8 modules: what a quantized model is made of."""

from .base import FP8Module, frozen
from .conv import FP8Conv2d
from .convert import fp8_modules, fp8_skeleton, quantize_weight, swap
from .fp8_tensor import FP8Tensor
from .linear import FP8Linear
from .recipe import DynamicRule, Recipe, recipe_for

__all__ = [
    "DynamicRule",
    "FP8Conv2d",
    "FP8Linear",
    "FP8Module",
    "FP8Tensor",
    "Recipe",
    "fp8_modules",
    "fp8_skeleton",
    "frozen",
    "quantize_weight",
    "recipe_for",
    "swap",
]
