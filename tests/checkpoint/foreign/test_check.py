"""Tensors that are not what the configuration says are refused by name, whatever the format."""

import pytest
import torch
from checkpoint.foreign.test_compressed_tensors import said
from foreign_checkpoints import change_tensors, llama, refusal, write

from optimum_fp8 import FP8CheckpointError
from optimum_fp8.checkpoint.foreign.check import as_ours

LAYER = "model.layers.0.mlp.up_proj"
SCALE = f"{LAYER}.weight_scale"
INPUT = f"{LAYER}.input_scale"


def without(key):
    return lambda tensors: tensors.pop(key)


def changed(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key])})


CHANGES = {
    "no scale": (without(SCALE), f"{SCALE} is missing"),
    "a scale of another shape": (
        changed(SCALE, lambda scale: scale[:100]),
        f"{SCALE} is F32 [100, 1], expected [384, 1]",
    ),
    "a scale for the tensor": (changed(SCALE, lambda scale: scale[:1]), f"{SCALE} is F32 [1, 1]"),
    "a scale in bytes": (changed(SCALE, lambda scale: scale.to(torch.uint8)), f"{SCALE} is U8"),
    "a scale that is zero": (changed(SCALE, torch.zeros_like), f"{SCALE} is [0.0"),
    "a scale that is NaN": (changed(SCALE, lambda scale: scale * torch.nan), f"{SCALE} is [nan"),
    "no scale of the input": (without(INPUT), f"{INPUT} is missing"),
    "scales of inputs": (changed(INPUT, lambda scale: scale.expand(2).clone()), f"{INPUT} is F32 [2]"),
    "codes that are NaN": (
        changed(f"{LAYER}.weight", lambda codes: torch.full_like(codes.float(), torch.nan).to(codes.dtype)),
        "codes that are NaN",
    ),
    "another scale": (
        lambda tensors: tensors.update({f"{LAYER}.output_scale": torch.ones(1)}),
        f"{LAYER}.output_scale",
    ),
    "packed weights": (
        lambda tensors: tensors.update({f"{LAYER}.weight_packed": torch.ones(4, 4, dtype=torch.int32)}),
        f"{LAYER}.weight_packed",
    ),
    "codes of no layer": (
        lambda tensors: tensors.update({"model.layers.0.stack": torch.ones(2, 2, 2).to(torch.float8_e4m3fn)}),
        "model.layers.0.stack is F8_E4M3 [2, 2, 2], codes that no layer",
    ),
    "the layer is missing": (
        lambda tensors: [tensors.pop(f"{LAYER}.{name}") for name in ("weight", "weight_scale", "input_scale")],
        f"{LAYER}.",
    ),
}


@pytest.mark.parametrize("change, expected", CHANGES.values(), ids=CHANGES)
def test_is_named(tmp_path, change, expected):
    folder = write(tmp_path / "theirs", llama(), "channel", "static", said("channel", "static"))
    change_tensors(folder, change)
    assert expected in refusal(folder)


def test_scales_of_inputs_that_are_not_said(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "channel", "static", said("channel", "token"))
    assert "input_scale is in the files, but the configuration says that inputs are scaled by token" in refusal(folder)


def test_e5m2_with_rounded_inputs(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said())
    change_tensors(folder, changed(f"{LAYER}.weight", lambda codes: codes.to(torch.float8_e5m2)))
    assert f"{LAYER}.weight is in E5M2" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents(dtype):
    exponents = torch.tensor([0, 1, 127, 130, 254], dtype=torch.uint8).view(dtype)
    found = as_ours(exponents, (5, 1))
    assert found.dtype == torch.float32 and found.shape == (5, 1)
    assert found.flatten().double().tolist() == [2.0**-127, 2.0**-126, 1.0, 8.0, 2.0**127]
    with pytest.raises(FP8CheckpointError, match="NaN"):
        as_ours(torch.tensor([255], dtype=torch.uint8).view(dtype), (1,))
    with pytest.raises(FP8CheckpointError, match="expected"):
        as_ours(exponents, (4, 1))
