"""Whether an FP8 checkpoint, ours or another's, is sound: what is wrong with it, in plain words."""

from .finding import Finding
from .run import verify
from .saving import save

__all__ = ["Finding", "save", "verify"]
