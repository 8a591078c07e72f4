"""FP8 checkpoints in the formats of other engines."""

from .engine_checkpoint import export

__all__ = ["export"]
