"""Which folders are taken, and which are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from files.conftest import WEIGHT_ONLY, tensors
from hf.conftest import llama
from safetensors.torch import load_file, save_file

from optimum_fp8 import FP8Config, quantize_files
from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.files.source import open_source

CONFIG = FP8Config(**WEIGHT_ONLY)


def refused(folder, tmp_path, message: str, **options) -> None:
    with pytest.raises(FP8CheckpointError, match=message):
        quantize_files(folder, tmp_path / "fp8", CONFIG, **options)
    assert not (tmp_path / "fp8").exists() and not (tmp_path / "fp8.partial").exists()


@pytest.mark.parametrize("names_only", [False, True])
def test_what_is_quantized_already_is_refused(save, tmp_path, names_only):
    source = save(llama())
    quantize_files(source, tmp_path / "once", CONFIG)
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "once" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "once", tmp_path, "quantized already", names_only=names_only)
    found = load_file(tmp_path / "model" / "model.safetensors")
    found["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1)
    save_file(found, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, "weight_scale_inv .* belongs to a quantized weight", names_only=names_only)
    del found["model.layers.0.mlp.up_proj.weight_scale_inv"]
    found["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.int8)
    save_file(found, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, "up_proj.weight .* is I8, where a weight was expected", names_only=names_only)


@pytest.mark.parametrize("said", [{"quant_method": "optimum_fp8"}, {"quant_method": "fp8"}])
def test_a_config_that_says_it_is_quantized_is_refused(save, tmp_path, said):
    source = save(llama())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    refused(source, tmp_path, f"quantized already.*{said['quant_method']}")


def test_folders_without_safetensors(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "no weights at all")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path / "empty", tmp_path, "only pytorch_model.bin, which is not read here .unpickling")
    refused("/no/such/folder", tmp_path, "is not a folder")


def test_folders_that_are_not_whole(save, tmp_path):
    source = save(llama(), max_shard_size="40KB")
    part = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    whole = part.read_bytes()
    part.write_bytes(whole[:200])
    refused(source, tmp_path, f"{part.name} cannot be read .* damaged")
    part.unlink()
    refused(source, tmp_path, f"{part.name} does not exist: the folder is not whole")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{")
    refused(source, tmp_path, "is not JSON")


def test_safetensors_of_other_names(tmp_path):
    (tmp_path / "other").mkdir()
    for number in (1, 2):
        save_file({f"blocks.{number}.weight": torch.randn(8, 8)}, tmp_path / "other" / f"part_{number}.safetensors")
    quantize_files(tmp_path / "other", tmp_path / "fp8", CONFIG)
    assert {each[0] for each in tensors(tmp_path / "fp8").values()} == {"model.safetensors"}
    shutil.copy(tmp_path / "other" / "part_1.safetensors", tmp_path / "other" / "part_3.safetensors")
    with pytest.raises(FP8CheckpointError, match="blocks.1.weight is in two files"):
        open_source(str(tmp_path / "other"))


def test_a_repository_in_the_cache_of_the_hub(save, tmp_path, monkeypatch):
    """The cache as it lies on disk, and no network."""
    from huggingface_hub import constants

    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    save(llama())
    shutil.copytree(tmp_path / "model", repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "tokenizer.model").write_text("sentences")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    quantize_files("someone/tiny", tmp_path / "hub-fp8", CONFIG)
    quantize_files(tmp_path / "model", tmp_path / "fp8", CONFIG)
    assert tensors(tmp_path / "hub-fp8") == tensors(tmp_path / "fp8")
    assert (tmp_path / "hub-fp8" / "tokenizer.model").read_text() == "sentences"
