"""Adapters that were trained beside a model, merged into its FP8 checkpoint."""

from .merge import merge_lora
from .report import MergeReport

__all__ = ["MergeReport", "merge_lora"]
