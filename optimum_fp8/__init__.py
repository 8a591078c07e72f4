"""FP8 quantization for Hugging Face models: one argument of `from_pretrained`.

    from optimum_fp8 import FP8Config
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=FP8Config(dataset="calibration.txt"))

Importing this package registers the quantization method with transformers. It is all that importing does: public names
are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import hf

if TYPE_CHECKING:
    from . import ops, scales
    from .adapters import merge_lora
    from .calibration import calibrate, range_movement
    from .checkpoint import load, load_single_file, native_config
    from .config import FP8Config
    from .errors import (
        FP8CalibrationError,
        FP8CheckpointError,
        FP8ConfigError,
        FP8Error,
        FP8MeasurementError,
        FP8NotAvailableError,
        FP8OperandError,
        FP8ScaleError,
        FP8SelectionError,
        FP8StateError,
    )
    from .exporting import export
    from .files import quantize_files
    from .hf.model_card import model_card
    from .measure import Measurements
    from .quantize import convert, dequantize, finalize_calibration, prepare, start_on_gaudi
    from .report import quantization_report
    from .rescaling import requantize, rescale
    from .self_test import selftest
    from .training import FP8Callback
    from .verifying import save, verify

__version__ = "0.1.0.dev0"

__all__ = [
    "FP8CalibrationError",
    "FP8Callback",
    "FP8CheckpointError",
    "FP8Config",
    "FP8ConfigError",
    "FP8Error",
    "FP8MeasurementError",
    "FP8NotAvailableError",
    "FP8OperandError",
    "FP8ScaleError",
    "FP8SelectionError",
    "FP8StateError",
    "Measurements",
    "calibrate",
    "convert",
    "dequantize",
    "export",
    "finalize_calibration",
    "load",
    "load_single_file",
    "merge_lora",
    "model_card",
    "native_config",
    "ops",
    "prepare",
    "quantization_report",
    "quantize_files",
    "range_movement",
    "requantize",
    "rescale",
    "save",
    "scales",
    "selftest",
    "start_on_gaudi",
    "verify",
]

_MODULES = ("cache", "errors", "formats", "modules", "ops", "scales")
# No name here may be a module's as well: importing the module would put it in the name's place.
_HOMES = {
    **{name: "errors" for name in __all__ if name.startswith("FP8") and name.endswith("Error")},
    "FP8Callback": "training",
    "FP8Config": "config",
    "Measurements": "measure",
    "calibrate": "calibration",
    "convert": "quantize",
    "dequantize": "quantize",
    "export": "exporting",
    "finalize_calibration": "quantize",
    "load": "checkpoint",
    "load_single_file": "checkpoint",
    "merge_lora": "adapters",
    "model_card": "hf.model_card",
    "native_config": "checkpoint",
    "prepare": "quantize",
    "quantization_report": "report",
    "quantize_files": "files",
    "range_movement": "calibration",
    "requantize": "rescaling",
    "rescale": "rescaling",
    "save": "verifying",
    "selftest": "self_test",
    "start_on_gaudi": "quantize",
    "verify": "verifying",
}

# What imports neither transformers' models nor its quantizers.
_LIGHT = ("config", "errors", "measure", "self_test")

hf.register()

if not TYPE_CHECKING:  # which would take any name for a known one

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if _HOMES[name] not in _LIGHT:
            # Before any module of ours is being imported: another thread may be importing it, and registers us at its
            # end. Python breaks such a circle by handing out half imported modules.
            import_module("transformers.modeling_utils")
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
