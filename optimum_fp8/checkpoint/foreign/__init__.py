"""FP8 checkpoints of other makers: what they hold, in our words. One file is one format."""

from importlib import import_module
from pkgutil import iter_modules

from .layers import Cache, Found, Layer
from .own_config import native_config
from .readers import READERS, register_reader
from .source import Source, source_of

for _file in iter_modules(__path__):  # each registers what it reads
    import_module(f".{_file.name}", __name__)

__all__ = ["READERS", "Cache", "Found", "Layer", "Source", "native_config", "register_reader", "source_of"]
