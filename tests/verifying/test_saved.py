"""Whether a checkpoint of ours is as it was saved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from verifying.conftest import UP, edit, edit_json, told


def test_nothing_is_wrong_with_what_was_saved(made):
    assert told(made["ours"]) == [] and told(made["compressed-tensors"]) == []


@pytest.mark.parametrize("name", ["ours", "compressed-tensors"])
def test_a_flipped_bit(copied, name):
    folder = copied(name)
    edit(folder, lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8).flatten()[:1].bitwise_xor_(1))
    assert any(f"error: {UP}.weight: found in" in each and "is not what was saved" in each for each in told(folder))


@pytest.mark.parametrize(
    "change, where",
    [
        (lambda said: said.update(rms_norm_eps=0.5), "config.json: rms_norm_eps: found 0.5, expected 1e-06"),
        (lambda said: said.pop("rope_parameters"), "config.json: rope_parameters: found None"),
        (lambda said: said.update(new=1), "config.json: new: found 1, expected None"),
        (
            lambda said: said["quantization_config"].update(observer="mse"),
            "quantization_config: observer: found 'mse', expected 'maxabs'",
        ),
        (lambda said: said["quantization_config"].pop("tokenizer"), "quantization_config: tokenizer: found"),
    ],
)
def test_an_edited_configuration(copied, change, where):
    folder = copied("ours")
    edit_json(folder, "config.json", change)
    assert any(where in each for each in told(folder))


def test_a_record_that_is_gone_is_a_warning(copied):
    folder = copied("ours")
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    found = told(folder)
    assert found and all(each.startswith("warning: ") and "found no record" in each for each in found)


def test_what_loading_would_make_of_it(copied):
    folder = copied("ours")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.odd.weight"] = tensors.pop("model.norm.weight")
        save_file(tensors, path, metadata={"format": "pt"})
    found = told(folder)
    assert any(each.startswith("error: model.norm.weight: found nothing") for each in found)
    assert any(each.startswith("error: model.odd.weight: found a tensor that LlamaForCausalLM") for each in found)
