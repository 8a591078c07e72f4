"""Names, dtypes and shapes of codes and scales, in the format of another engine."""

from __future__ import annotations

import re

import pytest
import torch
from verifying.conftest import UP, edit, edit_json, told

SCALE = f"{UP}.weight_scale"


def renamed(one: str, other: str):
    return lambda tensors: tensors.update({other: tensors.pop(one)})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(SCALE), rf"{UP}.weight: found codes in torch.float8_e4m3fn without a scale"),
        (lambda tensors: tensors.pop(f"{UP}.input_scale"), rf"{UP}: found no scale of the input"),
        (
            renamed(SCALE, f"{UP}.weight_scale_inv"),
            rf"{UP}.weight_scale_inv: found the scale of {UP}.weight by this name",
        ),
        (lambda tensors: tensors.pop(f"{UP}.weight"), rf"{SCALE}: found a scale whose weight is missing"),
        (lambda tensors: tensors.update({SCALE: torch.ones(63, 1)}), rf"{SCALE}: found a scale of shape \(63, 1\)"),
        (
            lambda tensors: tensors.update({SCALE: tensors[SCALE].long()}),
            rf"{SCALE}: found torch.int64, expected float32",
        ),
        (
            lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"].to(torch.bfloat16)}),
            rf"{SCALE}: found a scale whose weight is in torch.bfloat16",
        ),
    ],
)
def test_what_is_missing_or_wrong(copied, change, message):
    folder = copied("compressed-tensors")
    edit(folder, change, metadata={"format": "pt"})
    assert any(re.search(message, each) for each in told(folder))


def test_lists_of_exceptions(copied):
    folder = copied("compressed-tensors")
    edit_json(folder, "config.json", lambda said: said["quantization_config"]["ignore"].append(UP))
    assert any(f"{UP}.weight: found codes in FP8, though" in each for each in told(folder))


def test_layers_that_engines_fuse_are_in_one_precision(copied):
    folder = copied("compressed-tensors")

    def keep(tensors):
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.bfloat16)
        del tensors[SCALE], tensors[f"{UP}.input_scale"]

    edit(folder, keep, metadata={"format": "pt"})
    edit_json(folder, "config.json", lambda said: said["quantization_config"]["ignore"].append(UP))
    found = told(folder)
    assert any(
        each.startswith("warning: model.layers.0.mlp: found model.layers.0.mlp.up_proj in high") for each in found
    )


def test_a_folder_without_codes(made):
    assert any("found no tensor in FP8" in each for each in told(made["base"]))
