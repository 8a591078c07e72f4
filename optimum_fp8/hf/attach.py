"""Making a model that was converted by hand look to transformers as if it had been loaded quantized."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.base import _assign_is_quantized

from ..config import QUANT_METHOD
from ..lifecycle import state_of
from .quantizer import FP8Quantizer
from .saving import config_to_save, mark_as_quantized


def attach_quantizer(model: Any) -> None:
    """Give a converted model its quantizer and the configuration it is saved with."""
    state = state_of(model)
    assert state is not None
    config = config_to_save(state)
    quantizer = FP8Quantizer(config, pre_quantized=True)
    mark_as_quantized(model, config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    _assign_is_quantized(model)
