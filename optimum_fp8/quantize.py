"""prepare → your calibration loop → finalize_calibration → convert, on any nn.Module: the public verbs.

`from_pretrained`, the command line and everything else walk the same steps.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import nn

from . import ops
from .config import FP8Config
from .errors import FP8NotAvailableError, FP8StateError
from .hf.attach import attach_quantizer, detach_quantizers
from .lifecycle import (
    Phase,
    convert_with,
    finalize_calibration,
    prepare,
    refuse_second_time,
    state_of,
    trained_state,
    unfold_exactly,
    unmeasured_state,
    unwrapped,
)
from .lifecycle import dequantize as restore
from .modules.handler import pack_all

__all__ = ["convert", "dequantize", "finalize_calibration", "prepare", "start_on_gaudi"]


def convert(model: nn.Module, config: FP8Config | None = None) -> nn.Module:
    """Turn `model` into an FP8 model.

    A model in measuring state is converted with what was measured. Otherwise `config` is needed, and static
    activations are converted with the measurements at its `dump_stats_path`, if they are of this very model; with
    `activation_scheme="auto"` and no such measurements, activations become dynamic.

    An error leaves the model as it was.

    Args:
        model: a prepared model, or any module with layers that can be quantized.
        config: what to quantize and how, for a model that was not prepared.

    Returns:
        `model` itself.

    Raises:
        FP8StateError: converted already, or neither prepared nor given a config.
        FP8MeasurementError: static activations without calibration data, modules that calibration never reached, or
            measurements of another model.
        FP8ScaleError: a weight that has no sound scale.
    """
    given, model = model, unwrapped(model)
    state = state_of(model) if isinstance(model, nn.Module) else None
    if state is None or state.phase is Phase.CONVERTED:
        refuse_second_time(model, "convert", config)
        if config is None:
            raise FP8StateError("convert: this model was not prepared: call prepare(model, config), or pass a config")
        if config.fake_quant:
            raise FP8StateError(
                "convert: fake_quant=True is for models that are trained before: call prepare(model, config), train "
                "it, then convert(model); or leave fake_quant out"
            )
        state = unmeasured_state(model, config)
    elif config is not None and config != state.config:
        raise FP8StateError("convert: this model was prepared with another config: leave the argument out")
    if state.phase is Phase.TRAINING:
        with trained_state(model, state) as trained:
            convert_with(model, trained, attach_quantizer)
        return given
    try:
        convert_with(model, state, attach_quantizer)
    except BaseException:
        if state_of(model) is None:  # it was not prepared, and is as it was
            unfold_exactly(state.changes)
        raise
    return given


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put modules of the original classes, with dequantized weights, in place of the FP8 modules of `model`.

    A transformers model is then as one that was loaded in high precision: it can be trained, and saved without a trace
    of FP8. (They have this as `model.dequantize()`, too.)

    Args:
        model: a converted model, or one in measuring state.
        dtype: of the weights; by default the one they had.

    Returns:
        `model` itself.

    Raises:
        FP8NotAvailableError: some weights are offloaded.
    """
    restore(model, dtype)
    detach_quantizers(unwrapped(model))
    return model


@overload
def start_on_gaudi(model: None = None) -> None: ...
@overload
def start_on_gaudi(model: nn.Module) -> nn.Module: ...
def start_on_gaudi(model: nn.Module | None = None) -> nn.Module | None:
    """Start Intel Gaudi's software for inference, and bring a converted model onto the card.

    These are the bridge's own calls, in their order: `hpu_inference_set_env`, the move, and
    `hpu_inference_initialize`, which in lazy mode marks all scales as constants; under the names that the release has.
    `from_pretrained` with a `device_map` makes them by itself, and so does `convert` of a model that lies on a Gaudi.

    Args:
        model: a converted model, on any device. None: make the first call alone, before any tensor moves to the card,
            where others come before the FP8 model.

    Returns:
        `model` itself.

    Raises:
        FP8NotAvailableError: there is no Gaudi, or its bridge is not loaded.
        FP8StateError: the model was not converted.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise FP8StateError(f"start_on_gaudi: expected a converted model, found a {type(model).__name__}")
    packing = ops.packing_of("hpu")
    packing.set_up()
    if model is None:
        return None
    inner = unwrapped(model)
    state = state_of(inner)
    if state is None or state.phase is not Phase.CONVERTED:
        raise FP8StateError(
            f"start_on_gaudi: {type(inner).__name__} was not converted to FP8: call convert(model) before, or "
            "start_on_gaudi() without a model before one in high precision moves to the card"
        )
    if any(ops.packing_for(tensor.device) is not packing for tensor in (*inner.parameters(), *inner.buffers())):
        try:
            model.to("hpu")
        except ModuleNotFoundError as error:
            raise FP8NotAvailableError(
                "start_on_gaudi: torch has no device 'hpu' to move the model to; over an emulated bridge, call it "
                "within ops.backend('hpu'), where tensors stay on the CPU"
            ) from error
    pack_all(inner)
    return model
