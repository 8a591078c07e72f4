"""Reports: what became of a model."""

from .report import ModuleReport, QuantizationReport, quantization_report

__all__ = ["ModuleReport", "QuantizationReport", "quantization_report"]
