"""The plugin's side of transformers: what is registered there, and when.

transformers takes seconds to import, so nothing of it is imported for the sake of registering: each part waits until
transformers itself imports the module that looks it up. No two threads wait for each other's imports, whichever end
they start from, because what is imported then does not import that module in turn, and because the modules are waited
for in the order in which they import each other, the outermost first.
"""

from __future__ import annotations

from typing import Any

from ..import_hook import when_imported


def register() -> None:
    """Make `quantization_config=FP8Config(…)`, our checkpoints and our attention known; harmless when repeated."""
    when_imported("transformers.modeling_utils", _register_quantizer_and_attention)
    when_imported("transformers.masking_utils", _register_masks)
    when_imported("transformers.quantizers.auto", _register_config)


def _register_config(auto: Any) -> None:
    from ..config import QUANT_METHOD, FP8Config

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    auto.register_quantization_config(QUANT_METHOD)(FP8Config)


def _register_quantizer_and_attention(modeling_utils: Any) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer

    from ..attention.function import NAME, attention_forward
    from ..config import QUANT_METHOD
    from .quantizer import FP8Quantizer

    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    register_quantizer(QUANT_METHOD)(FP8Quantizer)
    modeling_utils.AttentionInterface.register(NAME, attention_forward)


def _register_masks(masking_utils: Any) -> None:
    from ..attention.function import NAME

    masking_utils.AttentionMaskInterface.register(NAME, masking_utils.eager_mask)
