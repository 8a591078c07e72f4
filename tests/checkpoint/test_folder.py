"""Weights in several files without their index: whatever would read them names it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fp8 import (
    FP8CheckpointError,
    FP8Config,
    convert,
    export,
    load,
    native_config,
    quantize_files,
    save,
    verify,
)
from optimum_fp8.checkpoint.folder import absent_index

INDEX = "model.safetensors.index.json"
NAMED = r"model\.safetensors\.index\.json does not exist, .*: the folder is not whole, copy it again"


def refused(call) -> None:
    with pytest.raises(FP8CheckpointError, match=NAMED):
        call()


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], INDEX),
        (["model-00002-of-00002.safetensors"], INDEX),
        (["model-00001-of-00002.safetensors", INDEX], None),
        (["model-00001-of-00002.safetensors", "model.safetensors"], None),  # which is read in their place
        (["model.safetensors", "adapter_model.safetensors"], None),
        (["first.safetensors", "second.safetensors"], None),
        (
            ["diffusion_pytorch_model-00001-of-00002.safetensors", INDEX],
            "diffusion_pytorch_model.safetensors.index.json",
        ),
    ],
)
def test_which_index_is_absent(tmp_path, names, absent):
    for name in names:
        (tmp_path / name).touch()
    assert absent_index(str(tmp_path)) == absent


def test_a_checkpoint_of_transformers(tmp_path):
    plain, fp8, out = tmp_path / "plain", tmp_path / "fp8", tmp_path / "out"
    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=False).bfloat16().save_pretrained(plain, max_shard_size="10KB")
    config = FP8Config(activation_scheme="dynamic", target="cpu", scale_method="maxabs_arbitrary")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(fp8, max_shard_size="10KB")
    export(fp8, tmp_path / "theirs")
    for folder in (plain, fp8, tmp_path / "theirs"):
        (folder / INDEX).unlink()
    refused(lambda: quantize_files(plain, out, config))
    refused(lambda: export(fp8, out))
    refused(lambda: native_config(tmp_path / "theirs"))
    assert not out.exists()
    for folder in (fp8, tmp_path / "theirs"):
        assert any(each.where == INDEX and "no such file" in each.found for each in verify(folder))


def test_a_module(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))

    model = convert(network(), FP8Config(activation_scheme="dynamic"))
    save(model, tmp_path / "fp8", max_shard_size="5KB")
    (tmp_path / "fp8" / INDEX).unlink()
    refused(lambda: load(tmp_path / "fp8", network()))
