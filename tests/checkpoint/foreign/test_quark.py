"""Quark: weights per tensor and channel, inputs static and dynamic, and caches."""

import pytest
import torch
from foreign_checkpoints import as_stored, check_runs, llama, load, refusal, write
from grids import slow_but

SPEC = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True, "ch_axis": None}
CHANNEL = {**SPEC, "qscheme": "per_channel", "ch_axis": 0}
INPUTS = {
    "static": SPEC,
    "tensor": {**SPEC, "is_dynamic": True},
    "token": {**SPEC, "qscheme": "per_channel", "is_dynamic": True, "ch_axis": 1},
    "none": None,
}


def parts(weight=SPEC, inputs=SPEC, outputs=None):
    return {"weight": weight, "input_tensors": inputs, "output_tensors": outputs, "bias": None, "target_device": None}


def said(weight=SPEC, inputs=SPEC, **more):
    return {
        "quant_method": "quark",
        "global_quant_config": parts(weight, inputs),
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "exclude": ["lm_head"],
        "softmax_quant_spec": None,
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
        **more,
    }


@pytest.mark.parametrize("weights", ["tensor", "channel"])
@pytest.mark.parametrize("inputs", slow_but(INPUTS, "static", "token"))
def test_runs(tmp_path, weights, inputs):
    config = said(SPEC if weights == "tensor" else CHANNEL, INPUTS[inputs])

    def names(name, tensors):
        return as_stored(name, {**tensors, "scale": tensors["scale"].squeeze()})

    check_runs(write(tmp_path / "theirs", llama(), weights, inputs, config, names), llama(), weights, inputs)


def test_scales_of_caches_are_those_of_outputs(tmp_path):
    scales = {f"model.layers.0.self_attn.{kind}_proj.output_scale": torch.tensor(0.0625) for kind in "kv"}
    patterns = {f"*{kind}_proj": parts(outputs=SPEC) for kind in "kv"}
    for number, more in enumerate(({"layer_quant_config": patterns}, {"kv_cache_quant_config": patterns})):
        folder = write(tmp_path / f"theirs{number}", llama(), "tensor", "static", said(**more), more=scales)
        child = load(folder).model.layers[0].self_attn.fp8_scales
        assert child.k_scale.tolist() == child.v_scale.tolist() == [0.0625]


CHANGES = {
    "integers": ({"global_quant_config": parts({**SPEC, "dtype": "int8"})}, "'int8'"),
    "groups": ({"global_quant_config": parts({**SPEC, "qscheme": "per_group"})}, "'per_group'"),
    "another axis": ({"global_quant_config": parts({**CHANNEL, "ch_axis": 1})}, "'ch_axis': 1"),
    "outputs": ({"global_quant_config": parts(outputs=SPEC)}, "output_tensors of model.layers.0.mlp.down_proj"),
    "a softmax": ({"softmax_quant_spec": SPEC}, "softmax_quant_spec"),
    "types of layers": ({"layer_type_quant_config": {"Conv2d": parts()}}, "layer_type_quant_config"),
    "an exception": ({"exclude": ["*up_proj"]}, "'*up_proj'"),
    "static inputs by channel": ({"global_quant_config": parts(inputs=CHANNEL)}, "input_tensors"),
}


@pytest.mark.parametrize("change, expected", CHANGES.values(), ids=CHANGES)
def test_what_is_not_read_is_named(tmp_path, change, expected):
    message = refusal(write(tmp_path / "theirs", llama(), "tensor", "static", said(**change)))
    assert "quant_method='quark'" in message and expected in message
