"""compressed-tensors: all its ways to scale FP8 run as they are computed by hand; all else is refused by name."""

import copy

import pytest
import torch
from foreign_checkpoints import as_stored, check_runs, e8m0, llama, load, refusal, write
from grids import slow_but

COMMON = {"num_bits": 8, "type": "float", "symmetric": True}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
WEIGHTS = {"tensor": {"strategy": "tensor"}, "channel": {"strategy": "channel"}, "block": BLOCK, "mx": MX}
INPUTS = {
    "static": {"strategy": "tensor", "dynamic": False},
    "tensor": {"strategy": "tensor", "dynamic": True},
    "token": {"strategy": "token", "dynamic": True},
    "group_128": {"strategy": "group", "group_size": 128, "dynamic": True},
    "group_32": {**MX, "dynamic": True},
}
SCHEMES = [
    *[(weights, inputs) for weights in ("tensor", "channel") for inputs in ("static", "tensor", "token", "none")],
    *[("block", "group_128"), ("block", "none"), ("mx", "group_32"), ("mx", "none")],
]


def group(weights, inputs, targets=("Linear",)):
    taken = None if inputs == "none" else {**COMMON, **INPUTS[inputs]}
    return {"weights": {**COMMON, "dynamic": False, **WEIGHTS[weights]}, "input_activations": taken, "targets": targets}


def said(weights="channel", inputs="token", **more):
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized" if weights == "mx" else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group(weights, inputs), "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **more,
    }


def in_bfloat16(name, tensors):
    """As llm-compressor writes scales: in the dtype of the model."""
    return as_stored(name, {**tensors, "scale": tensors["scale"].bfloat16()})


def as_bytes(name, tensors):
    return as_stored(name, {**tensors, "scale": e8m0(tensors["scale"])})


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "theirs", llama(), "channel", "token", said())


FAST = [("tensor", "static"), ("channel", "token"), ("block", "group_128"), ("mx", "group_32")]


@pytest.mark.parametrize("weights, inputs", slow_but(SCHEMES, *FAST))
def test_runs(tmp_path, weights, inputs):
    folder = write(
        tmp_path / "theirs", llama(), weights, inputs, said(weights, inputs), as_bytes if weights == "mx" else as_stored
    )
    check_runs(folder, llama(), weights, inputs)


def test_scales_in_bfloat16_become_float32(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said(), in_bfloat16)
    layer = load(folder).model.layers[0].mlp.up_proj
    expected = llama().model.layers[0].mlp.up_proj.weight.detach().abs().amax(dim=1, keepdim=True) / 448
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, expected.bfloat16().float())


def test_groups_and_names(tmp_path):
    """A group that names layers wins over one of a pattern, and that over one of the class."""
    groups = {
        "first": group("channel", "none"),
        "second": group("channel", "token", ["re:.*self_attn.*"]),
        "third": group("channel", "tensor", ["model.layers.0.self_attn.q_proj"]),
    }
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said(config_groups=groups))
    block = load(folder).model.layers[0]
    assert block.mlp.up_proj.activations == "weight_only"
    assert str(block.self_attn.k_proj.scheme.input.granularity) == "per token"
    assert str(block.self_attn.q_proj.scheme.input.granularity) == "per tensor"


@pytest.mark.parametrize("strategy, shape", [("tensor", (1,)), ("attn_head", (2, 1, 1))])
def test_scales_of_caches(tmp_path, strategy, shape):
    scales = {f"model.layers.0.self_attn.{kind}_scale": torch.full(shape, 0.01) for kind in "qkv"}
    scheme = {**COMMON, "strategy": strategy, "dynamic": False}
    config = said(kv_cache_scheme=scheme)
    folder = write(tmp_path / "theirs", llama(), "channel", "token", config, more=scales)
    model = load(folder)
    child = model.model.layers[0].self_attn.fp8_scales
    assert torch.equal(child.k_scale, torch.full(shape, 0.01)) and torch.equal(child.v_scale, child.k_scale)
    assert not hasattr(child, "q_scale")
    cache = model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2, return_dict_in_generate=True)
    stored = cache.past_key_values.layers[0].keys
    assert type(stored).__name__ == "FP8Tensor" and torch.equal(stored.scale.flatten(), child.k_scale.flatten())
    without = load(folder, kv_cache=False)
    assert not hasattr(without.model.layers[0].self_attn, "fp8_scales")


def test_caches_without_scales_are_refused(tmp_path):
    config = said(kv_cache_scheme={**COMMON, "strategy": "tensor", "dynamic": False})
    folder = write(tmp_path / "theirs", llama(), "channel", "token", config)
    assert "lack model.layers.0.self_attn.k_scale" in refusal(folder)
    half = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    folder = write(tmp_path / "half", llama(), "channel", "token", config, more=half)
    assert "lack model.layers.0.self_attn.v_scale" in refusal(folder)


def test_scales_of_caches_that_are_not_said_are_refused(tmp_path):
    """Readers of compressed-tensors leave such scales out with a warning."""
    more = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said(), more=more)
    assert "model.layers.0.self_attn.k_scale" in refusal(folder)


CHANGES = {
    "integers": ({"config_groups": {"a": {**group("channel", "token"), "weights": {"num_bits": 4}}}}, "num_bits is 4"),
    "a format": ({"format": "pack-quantized"}, "'pack-quantized'"),
    "a field": ({"rotation": "hadamard"}, "'rotation'"),
    "sparse weights": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "a transform": ({"transform_config": {"r1": {}}}, "transform_config"),
    "blocks": (
        {
            "config_groups": {
                "a": {**group("block", "none"), "weights": {**COMMON, **BLOCK, "block_structure": [64, 64]}}
            }
        },
        "[64, 64]",
    ),
    "another class": ({"config_groups": {"a": group("channel", "token", ["LlamaAttention"])}}, "'LlamaAttention'"),
    "no group": ({"config_groups": {"a": group("channel", "token", ["re:.*mlp.*"])}}, "no group"),
    "an exception": ({"ignore": ["re:.*down_proj"]}, "re:.*down_proj"),
    "a cache of integers": ({"kv_cache_scheme": {**COMMON, "type": "int"}}, "'int'"),
    "a dynamic cache": ({"kv_cache_scheme": {**COMMON, "dynamic": True}}, "kv_cache_scheme"),
    "a group of inputs": (
        {"config_groups": {"a": {**group("channel", "token"), "input_activations": {**COMMON, **MX, "dynamic": True}}}},
        "weights scaled by channel with inputs scaled by group_32",
    ),
}


@pytest.mark.parametrize("change, expected", CHANGES.values(), ids=CHANGES)
def test_what_is_not_read_is_named(tmp_path, change, expected):
    config = copy.deepcopy(said()) | change
    message = refusal(write(tmp_path / "theirs", llama(), "channel", "token", config))
    assert "compressed-tensors" in message and expected in message


def test_what_older_writers_say_of_the_same(tmp_path):
    """Strategies that are the default are left out, and weights that are not sparse are said to be dense."""
    given = {
        **COMMON,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "group_size": None,
    }
    groups = {"group_0": {"weights": {**given, "strategy": None}, "input_activations": given, "targets": ["Linear"]}}
    sparsity = {"format": "dense", "global_sparsity": 0.1, "registry_requires_subclass": False}
    config = said(config_groups=groups, quantization_status="frozen", sparsity_config=sparsity, version="0.9.2")
    check_runs(write(tmp_path / "theirs", llama(), "tensor", "static", config), llama(), "tensor", "static")


def test_zero_points(tmp_path):
    key = "model.layers.0.mlp.up_proj.weight_zero_point"
    zeros = {key: torch.zeros(384, 1, dtype=torch.int8)}
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said(), more=zeros)
    check_runs(folder, llama(), "channel", "token")
    folder = write(tmp_path / "other", llama(), "channel", "token", said(), more={key: zeros[key] + 1})
    assert key in refusal(folder)
