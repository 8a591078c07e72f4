"""What Intel Neural Compressor saved: a folder of its own, made by it on a CPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from foreign_checkpoints import change_config, change_tensors, check_no_copy, load, refusal, rounded
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

SAVED = Path(__file__).parents[2] / "data" / "inc" / "saved"
LAYER = "model.layers.0.mlp.up_proj"


def ids():
    return torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(SAVED, tmp_path / "theirs", copy_function=shutil.copyfile)
    return tmp_path / "theirs"


def by_hand():
    """The logits of the folder's model with quantize/dequantize pairs around its layers, in bfloat16."""
    tensors, config = load_file(SAVED / "model.safetensors"), AutoConfig.from_pretrained(SAVED)
    del config.quantization_config
    model = LlamaForCausalLM(config).bfloat16().eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("weight") or tensors[name].dtype == torch.bfloat16:
            parameter.data = tensors[name]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = tensors[f"{name}.weight"].t().bfloat16() * tensors[f"{name}.dequant_weights.scale"]
            scale = tensors[f"{name}.quant_input.scale"].float()
            module.forward = lambda x, w=weight, s=scale: F.linear(rounded(x.float(), s).bfloat16(), w)
    with torch.no_grad():
        return model(ids()).logits


def test_runs(folder, tmp_path):
    model = load(folder)
    check_no_copy(model)
    tensors, layer = load_file(SAVED / "model.safetensors"), model.get_submodule(LAYER)
    assert torch.equal(layer.codes.float(), tensors[f"{LAYER}.weight"].t().float())
    assert torch.equal(layer.weight_scale, tensors[f"{LAYER}.dequant_weights.scale"].float().reshape(1))
    assert torch.equal(layer.input_scale, tensors[f"{LAYER}.quant_input.scale"].float().reshape(1))
    with torch.no_grad():
        found, expected = model(ids()).logits, by_hand()
    assert (found - expected).float().norm() < 5e-3 * expected.float().norm()
    own = model.config.quantization_config
    assert (own.scale_method, own.use_qdq, own.activation_scheme) == ("maxabs_pow2", True, "static")
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()(ids()).logits, found)


def test_names_of_the_mode_without_pairs(folder):
    def change(tensors):
        for key in [key for key in tensors if ".quant_input." in key or ".dequant_weights." in key]:
            name, leaf = key.replace(".quant_input", "").replace(".dequant_weights", "").rsplit(".", 1)
            kind = "scale_weight" if "dequant" in key else "scale_input"
            tensor = tensors.pop(key)
            tensors[f"{name}.{kind}" if leaf == "scale" else f"{name}.quant_input.scale_inv"] = tensor

    change_tensors(folder, change)
    quantization = json.loads((SAVED / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**quantization, "use_qdq": "False"})
    layer = load(folder).get_submodule(LAYER)
    assert layer.scheme.arithmetic == "fused" and layer.activations == "static"


CHANGES = {
    "a cache": ({"model.layers.0.self_attn.k_cache.dequant_output.scale": torch.ones(())}, {}, "k_cache"),
    "another rank": ({f"{LAYER}.weight_0_2": torch.ones(2, 2)}, {}, "weight_0_2"),
    "dynamic": ({}, {"dynamic_quantization": "True"}, "dynamic_quantization"),
    "a dict": ({}, {"scale_method": {"default": {}}}, "scale_method is {'default': {}}"),
}


@pytest.mark.parametrize("more, said, expected", CHANGES.values(), ids=CHANGES)
def test_what_is_not_read_is_named(folder, more, said, expected):
    change_tensors(folder, lambda tensors: tensors.update(more))
    quantization = json.loads((SAVED / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**quantization, **said})
    assert expected in refusal(folder)
