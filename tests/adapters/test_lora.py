"""What is read of an adapter, and what is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from adapters.conftest import llama
from safetensors.torch import load_file, save_file

from optimum_fp8.adapters.lora import open_adapter
from optimum_fp8.errors import FP8CheckpointError, FP8NotAvailableError


@pytest.fixture
def edited(save, adapt):
    """An adapter with other keys in its configuration."""

    def make(**keys):
        folder = adapt(save(llama()))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}), encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3', expected 'LORA'"),
        ({"bias": "all"}, "bias='all'.*biases were trained"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*whole modules"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters=.*stacks of experts"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=.*rows of embeddings"),
        ({"lora_bias": True}, "lora_bias=True.*its B has a bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.*repeats layers"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*changes the weights of the base"),
        ({"use_qalora": True}, "use_qalora=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_more_than_adding_is_refused(edited, keys, message):
    with pytest.raises(FP8NotAvailableError, match=message):
        open_adapter(edited(**keys))


def test_adapted_embeddings_are_refused(save, adapt):
    folder = adapt(save(llama()), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(FP8NotAvailableError, match="embed_tokens.* is no lora_A or lora_B of a linear"):
        open_adapter(folder)


def test_ranks_that_do_not_fit(edited):
    with pytest.raises(FP8CheckpointError, match=r"says a rank of 8: expected \[8, in\] and \[out, 8\]"):
        open_adapter(edited(r=8))


def test_a_part_that_is_missing(edited):
    path = edited() / "adapter_model.safetensors"
    held = load_file(path)
    held.pop(next(key for key in held if "lora_B" in key))
    save_file(held, path)
    with pytest.raises(FP8CheckpointError, match="has no 'b' of the LoRA of model.layers.0"):
        open_adapter(path.parent)


def test_files_that_are_missing(tmp_path, save, adapt):
    with pytest.raises(FP8CheckpointError, match="adapter_config.json does not exist: expected what peft's"):
        open_adapter(tmp_path)
    folder = adapt(save(llama()))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FP8CheckpointError, match="adapter_model.bin is not read"):
        open_adapter(folder)


def test_scaling_is_peft_s(save, adapt):
    plain = save(llama())
    pattern = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32}}
    found = open_adapter(adapt(plain, **pattern))
    scaling = {name.removeprefix("model.layers."): each.scaling for name, each in found.items()}
    assert scaling["0.self_attn.q_proj"] == 4 and scaling["0.self_attn.v_proj"] == 2
    assert scaling["1.self_attn.v_proj"] == 8
    rslora = open_adapter(adapt(plain, "rslora", use_rslora=True))
    assert {each.scaling for each in rslora.values()} == {4.0}
    assert found["model.layers.0.mlp.down_proj"].shape == (64, 96)
    assert found["model.layers.0.mlp.down_proj"].a.dtype == torch.float32
