"""ModelOpt in its layouts, configured in `config.json` or in `hf_quant_config.json`."""

import json

import pytest
import torch
from foreign_checkpoints import as_stored, check_runs, e8m0, llama, load, refusal, write
from grids import slow_but


def said(algorithm, **more):
    """As its converter for config.json writes it."""
    group = {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "producer": {"name": "modelopt", "version": "0.47.0"},
        **more,
    }


def changed(change):
    return lambda name, tensors: as_stored(name, {**tensors, "scale": change(tensors["scale"])})


def scalars(name, tensors):
    return as_stored(name, {key: each if key == "weight" else each.squeeze() for key, each in tensors.items()})


CASES = {
    "FP8": ("FP8", "tensor", "static", scalars),
    "FP8_PER_CHANNEL_PER_TOKEN": ("FP8_PER_CHANNEL_PER_TOKEN", "channel", "token", changed(torch.squeeze)),
    "FP8_PB_WO": ("fp8_pb_wo", "block", "none", changed(lambda scale: scale[:, None, :, None])),
    "two dimensions": ("FP8_BLOCK_SCALES", "block", "none", as_stored),
    "MXFP8": ("MXFP8", "mx", "group_32", changed(e8m0)),
}


@pytest.mark.parametrize("case", slow_but(CASES, "FP8", "FP8_PB_WO"))
@pytest.mark.parametrize("beside", [False, True], ids=["config.json", "hf_quant_config.json"])
def test_runs(tmp_path, case, beside):
    algorithm, weights, inputs, names = CASES[case]
    folder = write(tmp_path / "theirs", llama(), weights, inputs, None if beside else said(algorithm), names)
    if beside:
        told = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "*.gate"]}
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": told}))
    check_runs(folder, llama(), weights, inputs)


def test_blocks_can_be_given_dynamic_inputs(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "block", "none", said("FP8_PB_WO"))
    check_runs(folder, llama(), "block", "group_128", activation_scheme="dynamic")


@pytest.mark.parametrize(
    "field", [{"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, {"kv_cache_quant_algo": "FP8"}]
)
def test_scales_of_caches(tmp_path, field):
    scales = {f"model.layers.0.self_attn.{kind}_proj.{kind}_scale": torch.tensor(0.03125) for kind in "kv"}
    folder = write(tmp_path / "theirs", llama(), "tensor", "static", said("FP8", **field), scalars, scales)
    child = load(folder).model.layers[0].self_attn.fp8_scales
    assert child.k_scale.tolist() == child.v_scale.tolist() == [0.03125]


def test_mixed_precision(tmp_path):
    layers = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"]
    layers += [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    config = said("MIXED_PRECISION", quantized_layers={name: {"quant_algo": "FP8"} for name in layers})
    check_runs(write(tmp_path / "theirs", llama(), "tensor", "static", config, scalars), llama(), "tensor", "static")
    config["quantized_layers"][layers[0]] = {"quant_algo": "NVFP4"}
    assert "quantized_layers['model.layers.0.self_attn.q_proj'].quant_algo is 'NVFP4'" in refusal(
        write(tmp_path / "other", llama(), "tensor", "static", config, scalars)
    )


CHANGES = {
    "an algorithm": ({"quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'"),
    "a cache in four bits": ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo is 'NVFP4'"),
    "a cache without scales": ({"kv_cache_quant_algo": "FP8"}, "lack model.layers.0.self_attn.k_scale"),
    "smoothing": ({"pre_quant_scale": True}, "pre_quant_scale is True"),
    "an exception": ({"ignore": ["*mlp*"]}, "'*mlp*'"),
}


@pytest.mark.parametrize("change, expected", CHANGES.values(), ids=CHANGES)
def test_what_is_not_read_is_named(tmp_path, change, expected):
    message = refusal(write(tmp_path / "theirs", llama(), "tensor", "static", said("FP8", **change), scalars))
    assert "quant_method='modelopt'" in message and expected in message
