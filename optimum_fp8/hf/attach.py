"""Making a model that was converted by hand look to transformers as if it had been loaded quantized, and back."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers.quantizers.base import _assign_is_quantized

from ..checkpoint.diffusers_models import attach_to_diffusers
from ..config import QUANT_METHOD
from ..lifecycle import state_of
from ..selection import is_of_diffusers
from .parts import attach_to_parts
from .quantizer import FP8Quantizer
from .saving import config_to_save, mark_as_quantized


def attach_quantizer(model: Any) -> None:
    """Give a converted model, and those inside it, their quantizers and the configurations they are saved with."""
    state = state_of(model)
    assert state is not None
    is_of_transformers: bool = isinstance(model, transformers.PreTrainedModel)  # and stays Any for the checker
    if is_of_transformers:
        config = config_to_save(model, state)
        quantizer = FP8Quantizer(config, pre_quantized=True)
        mark_as_quantized(model, config, state)
        model.hf_quantizer = quantizer
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        _assign_is_quantized(model)
    elif is_of_diffusers(model):
        attach_to_diffusers(model, state)
    attach_to_parts(model, state, FP8Quantizer)


def detach_quantizers(model: nn.Module) -> None:
    """Take the quantizer and its configuration off a model that is in high precision again, and off models in it."""
    for part in model.modules():
        quantizer = part.__dict__.get("hf_quantizer")  # its own: wrappers pass on what they are asked for
        if isinstance(quantizer, FP8Quantizer):
            quantizer.remove_quantization_config(part)
