"""`fp8`: DeepSeek's blocks, MXFP8 and scales per tensor, by all the names that they have."""

import pytest
import torch
from foreign_checkpoints import STATIC, check_runs, coded, e8m0, llama, load, refusal, write
from grids import slow_but

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MX = {**BLOCKS, "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
TENSORS = {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": ["lm_head"]}


def named(scale, change=lambda scale: scale, given="activation_scale", of_input=lambda scale: scale):
    """Names tensors, with the scale called and stored as told."""

    def names(name, tensors):
        found = {f"{name}.weight": tensors["weight"], f"{name}.{scale}": change(tensors["scale"])}
        return found | ({f"{name}.{given}": of_input(tensors["input"])} if "input" in tensors else {})

    return names


def as_exponents(scale):
    return e8m0(scale).view(torch.float8_e8m0fnu)


CASES = {
    "blocks": ("block", "group_128", BLOCKS, named("weight_scale_inv")),
    "DeepSeek-V4's name": ("block", "group_128", BLOCKS, named("scale")),
    "Mistral's name": ("block", "group_128", BLOCKS, named("qscale_weight")),
    "inputs by powers of two": ("block", "group_128_e8m0", {**BLOCKS, "scale_fmt": "ue8m0"}, named("weight_scale_inv")),
    "MXFP8 in bytes": ("mx", "group_32", MX, named("weight_scale_inv", e8m0)),
    "MXFP8 in exponents": ("mx", "group_32", MX, named("weight_scale_inv", as_exponents)),
    "MXFP8 by its own name": ("mx", "group_32", {"quant_method": "mxfp8"}, named("weight_scale", e8m0)),
    "a tensor": (
        *("tensor", "static", TENSORS),
        named("weight_scale_inv", torch.squeeze, "activation_scale", torch.squeeze),
    ),
    "a tensor for vLLM": ("tensor", "static", TENSORS, named("weight_scale", given="input_scale")),
    "a tensor, dynamic": ("tensor", "token", {**TENSORS, "activation_scheme": "dynamic"}, named("weight_scale")),
}


@pytest.mark.parametrize("case", slow_but(CASES, "blocks", "MXFP8 in exponents", "a tensor", "a tensor for vLLM"))
def test_runs(tmp_path, case):
    weights, inputs, said, names = CASES[case]
    folder = write(tmp_path / "theirs", llama(), weights, inputs, said, names)
    check_runs(folder, llama(), weights, inputs)


def test_scales_in_bfloat16_become_float32(tmp_path):
    names = named("weight_scale_inv", torch.Tensor.bfloat16)
    layer = load(write(tmp_path / "theirs", llama(), "block", "group_128", BLOCKS, names)).model.layers[0].mlp.up_proj
    expected = coded(llama().model.layers[0].mlp.up_proj.weight.detach(), "block")["scale"].bfloat16()
    assert layer.weight_scale.dtype == torch.float32 and torch.equal(layer.weight_scale, expected.float())


def test_input_scale(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "tensor", "static", TENSORS, named("weight_scale_inv", torch.squeeze))
    layer = load(folder).model.layers[0].mlp.up_proj
    assert torch.equal(layer.input_scale, torch.full((1,), STATIC)) and layer.weight_scale.shape == (1,)


CHANGES = {
    "blocks of another size": ({"weight_block_size": [32, 32]}, "weight_block_size is [32, 32]"),
    "MXFP8 with scales in float": ({"weight_block_size": [1, 32]}, "weight_block_size is [1, 32]"),
    "static blocks": ({"activation_scheme": "static"}, "activation_scheme='static'"),
    "experts in FP4": ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
    "embeddings": ({"modules_to_convert": ["embed_tokens"]}, "modules_to_convert"),
    "an unknown field": ({"gradient": 1}, "'gradient'"),
    "an exception": ({"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}, "model.layers.0.mlp.up_proj"),
}


@pytest.mark.parametrize("change, expected", CHANGES.values(), ids=CHANGES)
def test_what_is_not_read_is_named(tmp_path, change, expected):
    folder = write(tmp_path / "theirs", llama(), "block", "group_128", {**BLOCKS, **change}, named("weight_scale_inv"))
    message = refusal(folder)
    assert "quant_method='fp8'" in message and expected in message


def test_two_scales_of_one_layer_are_refused(tmp_path):
    more = {"model.layers.0.mlp.up_proj.scale": torch.ones(3, 2)}
    folder = write(tmp_path / "theirs", llama(), "block", "group_128", BLOCKS, named("weight_scale_inv"), more)
    assert "are both in the files" in refusal(folder)


def test_an_exponent_that_is_nan_is_refused(tmp_path):
    def spoilt(scale):
        return e8m0(scale).index_fill(0, torch.tensor([0]), 255)

    folder = write(tmp_path / "theirs", llama(), "mx", "group_32", MX, named("weight_scale_inv", spoilt))
    assert "e8m0 that is NaN" in refusal(folder)
