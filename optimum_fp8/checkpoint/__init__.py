"""Checkpoint formats: our own, and the seam for others."""

from importlib import import_module
from pkgutil import iter_modules

from .foreign import native_config
from .format import FORMATS, Checkpoint, Format, Record, checkpoint_of, format_called, register_format, write
from .native import Native
from .plain import load, save
from .single_file import load_single_file

for _file in iter_modules(__path__):  # each registers what it defines
    import_module(f".{_file.name}", __name__)

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Format",
    "Native",
    "Record",
    "checkpoint_of",
    "format_called",
    "load",
    "load_single_file",
    "native_config",
    "register_format",
    "save",
    "write",
]
