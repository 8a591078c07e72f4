"""FP8 quantization for Hugging Face models: one argument of `from_pretrained`.

    from optimum_fp8 import FP8Config
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=FP8Config(dataset="calibration.txt"))

Importing this package registers the quantization method with transformers.
"""

from . import hf, ops, scales
from .calibration import calibrate
from .config import FP8Config
from .measure import Measurements
from .quantize import convert, dequantize, finalize_calibration, prepare
from .report import quantization_report

__version__ = "0.1.0.dev0"

hf.register()

__all__ = [
    "FP8Config",
    "Measurements",
    "calibrate",
    "convert",
    "dequantize",
    "finalize_calibration",
    "ops",
    "prepare",
    "quantization_report",
    "scales",
]
