"""What an FP8 checkpoint is: ours in full, others by their structure."""

from __future__ import annotations

import json
import os

import pytest
import torch
from exporting.conftest import wide_llama
from hf.conftest import llama
from rescaling.conftest import ATTENTION
from safetensors.torch import save_file

from optimum_fp8 import FP8CheckpointError, FP8Config, convert, export, rescale, save
from optimum_fp8.checkpoint.provenance import provenance_of
from optimum_fp8.rescaling import inspect
from optimum_fp8.rescaling.inspection import granularity, spread

E4M3 = torch.float8_e4m3fn


@pytest.mark.core
def test_of_ours_it_tells_all_that_is_known(fp8, batches, tmp_path):
    folder = fp8(FP8Config(dataset=batches, target="gaudi3", **ATTENTION))
    found = inspect(folder)
    assert {name: found[name] for name in provenance_of(folder)} == provenance_of(folder)
    assert found["format"] == "optimum_fp8" and found["architectures"] == ["LlamaForCausalLM"]
    assert found["schemes"]["all modules"].startswith("E4M3 on gaudi3, weight per tensor maxabs hardware")
    (weights,) = found["weights"]
    assert (weights["count"], weights["dtype"], weights["scaled"]) == (14, "float8_e4m3fn", "per tensor")
    assert weights["parameters"] == found["size"]["fp8"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    smallest, median, largest = weights["scales"]
    assert 0 < smallest <= median <= largest and len(weights["input_scales"]) == 3
    assert found["attention"]["q_scale"]["count"] == 2 and found["attention"]["p_scale"]["spread"]
    assert found["tensors"]["float8_e4m3fn"] == 14
    assert sum(found["size"].values()) == os.path.getsize(folder / "model.safetensors") - _header(folder)
    json.dumps(found)
    rescale(folder, tmp_path / "out", target="gaudi2")
    assert inspect(tmp_path / "out")["changes"][0]["target"] == "gaudi2"


def _header(folder) -> int:
    with open(folder / "model.safetensors", "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_modules_that_are_scaled_otherwise_have_a_scheme_and_a_row_of_their_own(fp8):
    overrides = {"down_proj": {"scale_method": "full_range_pcs"}}
    found = inspect(fp8(FP8Config(activation_scheme="dynamic", target="cpu", overrides=overrides)))
    assert len(found["schemes"]) == 2 and {each["scaled"]: each["count"] for each in found["weights"]} == {
        "per tensor": 12,
        "per channel": 2,
    }


def test_any_module_that_save_wrote(tmp_path):
    config = FP8Config(activation_scheme="dynamic", target="cpu")
    save(convert(torch.nn.Sequential(torch.nn.Linear(8, 4)), config), tmp_path / "m")
    found = inspect(tmp_path / "m")
    assert found["format"] == "optimum_fp8" and found["architectures"] == [] and found["weights"][0]["parameters"] == 32


@pytest.mark.parametrize(
    ("preset", "format", "scaled"),
    [
        ("FP8_BLOCK", "fp8", "per block 128×128"),
        ("MXFP8", "fp8", "per group of 32"),
        ("FP8_DYNAMIC", "compressed-tensors", "per channel"),
    ],
)
def test_of_others_it_tells_the_structure(fp8, tmp_path, preset, format, scaled):
    folder = fp8(FP8Config.preset(preset, target="cpu"), wide_llama())
    export(folder, tmp_path / "out", format)
    ours, found = inspect(folder), inspect(tmp_path / "out")
    assert found["format"] == format and found["quantization_config"]["quant_method"] == format
    assert found["weights"][0]["scaled"] == ours["weights"][0]["scaled"] == scaled
    assert found["weights"][0]["scales"] == ours["weights"][0]["scales"]
    assert found["size"]["fp8"] == ours["size"]["fp8"] and "made_with" not in found


def test_a_model_in_high_precision_has_no_weights_in_fp8(save):
    found = inspect(save(llama()))
    assert (
        found["format"] is None
        and found["weights"] == []
        and found["size"]["fp8"] == 0 < found["size"]["high_precision"]
    )


def test_codes_without_a_scale_are_told(tmp_path):
    save_file({"a.weight": torch.zeros(4, 4).to(E4M3), "b.weight": torch.zeros(4)}, tmp_path / "x.safetensors")
    found = inspect(tmp_path)
    assert found["weights"][0]["scaled"] == "without a scale" and found["weights"][0]["scales"] == []


@pytest.mark.parametrize(
    ("shape", "scale", "text"),
    [
        ((8, 4), (1,), "per tensor"),
        ((8, 4), (), "per tensor"),
        ((8, 4), (8, 1), "per channel"),
        ((8, 4), (8,), "per channel"),
        ((8, 4, 3, 3), (8, 1, 1, 1), "per channel"),
        ((256, 384), (2, 3), "per block 128×128"),
        ((8, 64), (8, 2), "per group of 32"),
        ((8, 4), (2,), "in 2 parts"),
        ((3, 8, 4), (3, 8, 1), "of each matrix per channel"),
        ((3, 8, 4), (3, 2, 1), "of each matrix by halves"),
        ((8, 4, 3, 3), (2, 2), "by a scale of shape (2, 2)"),
    ],
    ids=str,
)
def test_how_weights_are_scaled_in_words(shape, scale, text):
    assert granularity(shape, scale) == text


def test_the_spread_of_scales():
    assert spread([torch.tensor([4.0, 1.0]), torch.tensor([2.0])]) == [1.0, 2.0, 4.0] and spread([]) == []


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FP8CheckpointError, match="is not a folder"):
        inspect(tmp_path / "nothing")
    with pytest.raises(FP8CheckpointError, match="holds no safetensors"):
        inspect(tmp_path)
