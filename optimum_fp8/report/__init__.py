"""Reports: what became of a model."""

from .modules import ModuleReport, OtherReport
from .report import QuantizationReport, quantization_report
from .size import Size
from .table import format_bytes, format_share

__all__ = [
    "ModuleReport",
    "OtherReport",
    "QuantizationReport",
    "Size",
    "format_bytes",
    "format_share",
    "quantization_report",
]
