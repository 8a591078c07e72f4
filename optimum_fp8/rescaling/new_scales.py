"""rescale: a checkpoint of ours with the scales of another method or target, without calibration data."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.folder import refuse_without_index
from ..config import KEYS, FP8Config
from ..errors import FP8CheckpointError, FP8ConfigError
from ..files.source import open_source
from ..formats import is_fp8
from ..hf.attach import attach_quantizer
from ..lifecycle import MERGED, FP8State, Phase, convert_with, new_measurements, state_of, with_change
from ..modules import fp8_modules
from ..modules.handler import converted_modules
from ..scales import scale_method as method_called
from ..selection import select
from .opened import (
    Rewritten,
    open_checkpoint,
    refuse_existing,
    refuse_unchanged,
    rescheme,
    with_keys,
    write_checkpoint,
)

_FARTHEST = 0.25  # of a weight's norm: no FP8 rounding adds so much, and another model's weights are much farther
_GAIN = 0.04  # errors of rounding go both ways, and leave a weight as large as it was
_NO_RANGES = (
    "from_pretrained(…, quantization_config=FP8Config(target=…)) adapts such scales by a power of two; else quantize "
    "the original model, or requantize with a dataset"
)


def rescale(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    scale_method: str | None = None,
    target: str | None = None,
    original: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
) -> Rewritten:
    """Write a checkpoint of ours with the scales of another method, or for another target; no data are needed.

    Scales of inputs, attention and caches are derived anew from the ranges in the checkpoint. Weights are quantized
    anew from the original where it is given, and are then to the bit those of quantizing it with these ranges. Else
    they keep their values wherever the new scales allow it, and what was rounded again is told.

    Args:
        folder: of the checkpoint, of a model of transformers.
        output: a folder that is not there yet.
        scale_method: the new one; None: as it is.
        target: "gaudi2", "gaudi3", "cuda" or "cpu"; None: as it is.
        original: folder or hub name of the model in high precision that the checkpoint was made from.
        max_shard_size: of one file of weights, as `save_pretrained` takes it.

    Returns:
        where it is, and what became of the weights of each module.

    Raises:
        FP8ConfigError: an unknown method or target, neither was given, or the checkpoint has them already and there is
            no original.
        FP8CheckpointError: the output exists, the folder holds no checkpoint of ours, or the original is not that of
            the checkpoint.
        FP8MeasurementError: the checkpoint lacks ranges that static scales follow from.
    """
    source, place = os.fspath(folder), os.fspath(output)
    keys = _checked(scale_method, target)
    refuse_existing(place)
    model, state = open_checkpoint(source)
    before, provenance = state.config, state.provenance
    config = with_keys(before, keys)
    if original is None:
        refuse_unchanged("rescale", before, config, keys, "give another, or the original to quantize it anew")
        made = Rewritten(os.path.abspath(place), config, rescheme(model, state, config, source, _NO_RANGES))
    else:
        made = Rewritten(os.path.abspath(place), config, (), os.fspath(original))
        model, state = _quantized_anew(model, state, config, os.fspath(original))
    was = {key: getattr(before, key) for key in keys}
    state.provenance = with_change(provenance, "rescaled", **keys, before=was, **made.change())
    write_checkpoint(model, source, place, max_shard_size)
    return made


def _checked(scale_method: str | None, target: str | None) -> dict[str, Any]:
    """The keys that were given.

    Raises:
        FP8ConfigError: none was, or one is unknown.
    """
    given = {"scale_method": scale_method, "target": target}
    keys = {name: KEYS[name].normalize(value) for name, value in given.items() if value is not None}
    if not keys:
        raise FP8ConfigError("rescale: nothing to change: give scale_method, target or both")
    if "scale_method" in keys:
        if not isinstance(scale_method, str):
            raise FP8ConfigError(f"rescale: scale_method={scale_method!r}: expected the name of one, for all modules")
        method_called(scale_method)
    FP8Config(**({"target": keys["target"]} if "target" in keys else {}))
    return keys


# --- from the original ----------------------------------------------------------------------------------------------


def _quantized_anew(
    fp8: PreTrainedModel, state: FP8State, config: FP8Config, original: str
) -> tuple[PreTrainedModel, FP8State]:
    """The original quantized as a configuration says, with the ranges of the checkpoint that was made from it.

    Raises:
        FP8CheckpointError: it is not the original of this checkpoint.
    """
    if any(each.get("what") == MERGED for each in state.provenance.get("changes", [])):
        raise FP8CheckpointError(
            f"an adapter was merged into the checkpoint, which {original} does not have: leave `original` out, or "
            "merge the adapter into the original with peft and quantize that"
        )
    open_source(original)  # refuses what is quantized, and what holds no safetensors
    if os.path.isdir(original):
        refuse_without_index(original)
    model = type(fp8).from_pretrained(original, dtype=fp8.dtype)
    _check_original(model, fp8, original, folded=config.fold_batch_norm)
    config = config.replace(mode="AUTO")
    measured = new_measurements(model, config)
    expected = state.provenance.get("data", {}).get("model_fingerprint")
    if expected is not None and measured.fingerprint != expected:
        raise _other(original, f"its fingerprint is {measured.fingerprint}, and the checkpoint's {expected}")
    measured.tensors, measured.samples = state.measurements.tensors, state.measurements.samples
    convert_with(model, FP8State(config, select(model, config), Phase.MEASURING, measured), attach_quantizer)
    if unlike := set(converted_modules(model)).symmetric_difference(converted_modules(fp8)):
        raise _other(original, f"other modules of it become FP8: {', '.join(sorted(unlike)[:4])}")
    if expected is None:
        _check_weights(model, fp8, original)
    made = state_of(model)
    assert made is not None
    return model, made


def _other(original: str, how: str) -> FP8CheckpointError:
    return FP8CheckpointError(
        f"original={original!r} is not the model that the checkpoint was made from: {how}; give that, or leave "
        "`original` out"
    )


def _check_original(model: nn.Module, fp8: nn.Module, original: str, *, folded: bool) -> None:
    """Refuse a model of other shapes, or with other weights where the checkpoint has them in high precision."""
    layers = fp8_modules(fp8)
    ours, theirs = fp8.state_dict(), model.state_dict()
    for name, tensor in theirs.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in layers:
            expected: Any = tuple(layers[module].to_out_in(tensor).shape)
            if expected != tuple(layers[module].weight_shape):
                raise _other(
                    original, f"{name} is {expected}, and in the checkpoint {tuple(layers[module].weight_shape)}"
                )
        elif name in ours and not is_fp8(ours[name].dtype) and not folded:
            if ours[name].shape != tensor.shape:
                raise _other(
                    original, f"{name} is {tuple(tensor.shape)}, and in the checkpoint {tuple(ours[name].shape)}"
                )
            if not torch.equal(ours[name].to(tensor.dtype), tensor):
                raise _other(original, f"{name} has other values")


def _check_weights(model: nn.Module, fp8: nn.Module, original: str) -> None:
    """Refuse a model whose weights are none that the checkpoint's could have been rounded from."""
    made = fp8_modules(model)
    for name, layer in fp8_modules(fp8).items():
        before, after = (each.dequantized_weight(torch.float32) for each in (layer, made[name]))
        if (distance := float((after - before).norm() / before.norm().clamp(min=1e-30))) > _FARTHEST:
            raise _other(original, f"the weight of {name} differs by {distance:.0%}, which no rounding does")
        gain = float((after * before).sum() / before.square().sum().clamp(min=1e-30))
        if abs(gain - 1) > _GAIN:
            raise _other(original, f"the weight of {name} is {gain:.3f} times as large, which no rounding does")
