"""torchao's Float8Tensor in safetensors, described by the metadata of the files."""

import json

import pytest
import torch
from foreign_checkpoints import check_runs, is_layer, llama, refusal, write

SAID = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}


def names(name, tensors):
    scale = tensors["scale"].reshape(-1, 1)
    return {f"{name}._weight_qdata": tensors["weight"], f"{name}._weight_scale": scale}


def metadata(weights, granularity=None, **more):
    found = {"format": "pt"}
    for name, layer in llama().named_modules():
        if is_layer(name) and name.endswith("_proj"):
            rows, size = layer.weight.shape
            inputs = {"float8_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}, "hp_value_lb": None}
            given = {
                "_type": "QuantizeTensorToFloat8Kwargs",
                "_data": {**inputs, "granularity": {"_type": granularity}},
            }
            data = {"block_size": [1 if weights == "channel" else rows, size], **more}
            data["act_quant_kwargs"] = given if granularity else None
            told = {"_type": "Float8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
            found[f"{name}.weight"] = json.dumps(told)
    return found


@pytest.mark.parametrize(
    "weights, inputs, granularity",
    [
        ("channel", "token", "PerRow"),
        ("tensor", "tensor", "PerTensor"),
        ("channel", "none", None),
        ("tensor", "none", None),
    ],
)
def test_runs(tmp_path, weights, inputs, granularity):
    told = metadata(weights, granularity)
    folder = write(tmp_path / "theirs", llama(), weights, inputs, SAID, names, metadata=told)
    check_runs(folder, llama(), weights, inputs)


@pytest.mark.parametrize(
    "told, expected",
    [
        ({"format": "pt"}, "expected a Float8Tensor"),
        (metadata("channel", "PerBlock"), "act_quant_kwargs"),
        (metadata("channel", block_size=[1, 32]), "block_size is [1, 32]"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, told, expected):
    folder = write(tmp_path / "theirs", llama(), "channel", "none", SAID, names, metadata=told)
    assert "quant_method='torchao'" in (message := refusal(folder)) and expected in message


def test_the_rest_of_the_file_is_loaded(tmp_path):
    plain = llama()
    folder = write(tmp_path / "theirs", plain, "channel", "none", SAID, names, metadata=metadata("channel"))
    from foreign_checkpoints import load

    assert torch.equal(load(folder).model.embed_tokens.weight, plain.model.embed_tokens.weight)
