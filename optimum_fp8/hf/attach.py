"""Making a model that was converted by hand look to transformers as if it had been loaded quantized."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.quantizers.base import _assign_is_quantized

from ..config import QUANT_METHOD, FP8Config
from ..modules import fp8_modules
from ..state import FP8State, state_of
from .conversions import without_fp8


def attach_quantizer(model: Any) -> None:
    """Give a converted model its quantizer and the configuration it is saved with."""
    from .quantizer import FP8Quantizer

    state = state_of(model)
    assert state is not None
    config = checkpoint_config(state)
    quantizer = FP8Quantizer(config, pre_quantized=True)
    settle(model, config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    _assign_is_quantized(model)


def settle(model: Any, config: FP8Config) -> None:
    """What a converted model needs to be saved soundly: its config, no stale weight conversions, no broken ties."""
    model.config.quantization_config = config
    modules = fp8_modules(model)
    names = list(modules)
    for module in modules.values():
        module.managed = True
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:  # made from a config: what transformers would look up when saving
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    model._weight_conversions = without_fp8(conversions, names)
    _untie(model, names)


def checkpoint_config(state: FP8State) -> FP8Config:
    """The configuration a checkpoint carries: everything decided, nothing live, every exception by name."""
    config = state.config
    return config.replace(
        mode="LOAD",
        target=config.resolved_target,
        activation_scheme="static" if config.scheme == "auto" else config.scheme,
        dynamic_quantization=False,
        allowlist=None,
        blocklist=None,
        modules_to_not_convert=[
            decision.name for decision in (*state.decisions, *state.attention) if not decision.selected
        ],
        dataset=None,
        tokenizer=None,
        processor=None,
        dequantize=False,
    )


def _untie(model: Any, names: list[str]) -> None:
    """An output head in FP8 has a weight of its own: it is no longer tied to the embedding."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    broken = [key for key in tied if key.removesuffix(".weight") in names]
    if broken:
        model.all_tied_weights_keys = {key: source for key, source in tied.items() if key not in broken}
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            config.tie_word_embeddings = False
