"""FP8 modules, which a quantized model is made of, and the handlers through which the steps know them."""

from importlib import import_module
from pkgutil import iter_modules

from .base import FP8Module
from .conv import FP8Conv, FP8Conv1d, FP8Conv2d, FP8Conv3d
from .handler import ModuleHandler, register_handler
from .layer import LayerHandler, fp8_modules
from .linear import FP8Conv1D, FP8Linear, FP8LinearBase
from .own_forward import register_equivalent
from .parallel import part_of
from .swap import swap
from .weight import FP8Weight, frozen

for _file in iter_modules(__path__):  # each registers what it defines
    import_module(f".{_file.name}", __name__)

__all__ = [
    "FP8Conv",
    "FP8Conv1D",
    "FP8Conv1d",
    "FP8Conv2d",
    "FP8Conv3d",
    "FP8Linear",
    "FP8LinearBase",
    "FP8Module",
    "FP8Weight",
    "LayerHandler",
    "ModuleHandler",
    "fp8_modules",
    "frozen",
    "part_of",
    "register_equivalent",
    "register_handler",
    "swap",
]
