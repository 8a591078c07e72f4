"""Whether an FP8 checkpoint, ours or another's, is sound: what is wrong with it, in plain words."""

from .finding import Finding
from .run import verify

__all__ = ["Finding", "verify"]
