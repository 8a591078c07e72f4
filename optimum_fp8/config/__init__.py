"""What the user asks for: FP8Config, the table of its keys, and configuration files of Intel Neural Compressor.

FP8Config itself is imported when it is first used: it needs transformers, and the table is read without.
"""

from typing import TYPE_CHECKING, Any

from .keys import FORMAT_VERSION, KEYS, QUANT_METHOD

if TYPE_CHECKING:
    from .config import FP8Config

__all__ = ["FORMAT_VERSION", "KEYS", "QUANT_METHOD", "FP8Config"]

if not TYPE_CHECKING:  # which would take any name for a known one

    def __getattr__(name: str) -> Any:
        if name != "FP8Config":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .config import FP8Config

        globals()[name] = FP8Config
        return FP8Config
