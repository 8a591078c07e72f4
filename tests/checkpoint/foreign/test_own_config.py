"""native_config: what it asks of a folder and of its arguments."""

import json

import pytest
import torch
from checkpoint.foreign.test_compressed_tensors import said
from foreign_checkpoints import change_config, llama, load, write
from safetensors.torch import save_file

from optimum_fp8 import FP8CheckpointError, FP8Config, FP8ConfigError, native_config
from optimum_fp8.checkpoint.foreign import source_of


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "theirs", llama(), "channel", "token", said())


def test_it_is_a_configuration_of_transformers(checkpoint):
    config = native_config(str(checkpoint), target="gaudi3", hp_dtype="bf16")
    assert config.model_type == "llama" and config.hidden_size == 256
    own = config.quantization_config
    assert isinstance(own, FP8Config) and own.scale_method == "full_range_pcs"
    assert (own.activation_scheme, own.hp_dtype, own.modules_to_not_convert[:1]) == ("dynamic", "bf16", ["lm_head"])
    assert source_of(own).method == "compressed-tensors"


def test_the_source_is_not_written(checkpoint):
    own = native_config(checkpoint).quantization_config
    assert "_source" not in own.to_dict() and source_of(own.replace(hp_dtype="bf16")) is None


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"fp8_config": "E5M2"}, "'fp8_config' is decided by the checkpoint"),
        ({"dataset": "text"}, "'dataset' is decided"),
        ({"hp_dtyp": "bf16"}, "did you mean 'hp_dtype'"),
        ({"target": "gaudi7"}, "target='gaudi7'"),
        ({"scale_method": "full_range"}, "those of model.layers.0"),
    ],
)
def test_what_cannot_be_asked_for(checkpoint, options, expected):
    with pytest.raises(FP8ConfigError) as error:
        native_config(checkpoint, **options)
    assert expected in str(error.value)


def test_another_method_for_inputs(checkpoint):
    layer = load(checkpoint, scale_method="full_range_pcs_by_tensor").model.layers[0].mlp.up_proj
    assert str(layer.scheme.input.granularity) == "per tensor"


def refused(folder):
    with pytest.raises(FP8CheckpointError) as error:
        native_config(folder)
    return str(error.value)


def test_other_folders(tmp_path, checkpoint):
    assert "has no config.json" in refused(tmp_path)
    llama().save_pretrained(tmp_path / "plain")
    assert "does not say how it is quantized" in refused(tmp_path / "plain")
    change_config(checkpoint, quantization_config={"quant_method": "awq", "bits": 4})
    assert "quant_method='awq' is not read: expected compressed-tensors, fbgemm_fp8, fp8" in refused(checkpoint)
    change_config(checkpoint, quantization_config={"bits": 4})
    assert "quant_method=None is not read" in refused(checkpoint)
    change_config(checkpoint, quantization_config={"quant_method": "optimum_fp8"})
    assert "is a checkpoint of optimum_fp8" in refused(checkpoint)


def test_no_layer_in_fp8(tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    change_config(tmp_path / "plain", quantization_config=said())
    assert "has no layer in FP8" in refused(tmp_path / "plain")


def test_files(tmp_path, checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "a.safetensors")
    assert "has neither model.safetensors nor" in refused(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert "b.safetensors does not exist" in refused(checkpoint)
    index.write_text(json.dumps({"weight_map": {}}))
    assert "has no 'weight_map'" in refused(checkpoint)
    save_file({"x": torch.ones(1)}, checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:20])
    assert "is damaged" in refused(checkpoint)


def test_a_configuration_inside_that_of_the_text_model(checkpoint):
    change_config(checkpoint, quantization_config=None, text_config={"quantization_config": said()})
    assert native_config(checkpoint).quantization_config.scale_method == "full_range_pcs"
