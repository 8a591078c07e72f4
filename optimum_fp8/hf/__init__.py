"""The plugin's side of transformers."""

from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ..config import QUANT_METHOD, FP8Config
from ..modules.attention import register as register_attention
from .quantizer import FP8Quantizer


def register() -> None:
    """Make `quantization_config=FP8Config(…)`, our checkpoints and our attention known; harmless when repeated."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    register_quantization_config(QUANT_METHOD)(FP8Config)
    register_quantizer(QUANT_METHOD)(FP8Quantizer)
    register_attention()


__all__ = ["FP8Quantizer", "register"]
