"""A disk that is full: whoever writes says so with the path and what to do, and leaves nothing half written."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_llama
from torch import nn

from optimum_fp8 import FP8CheckpointError, FP8Config, convert, export, merge_lora, quantize_files, save

DYNAMIC = FP8Config(activation_scheme="dynamic")


@contextmanager
def room_for(size):
    """No file may become larger than `size` bytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def converted():
    torch.manual_seed(0)
    return convert(tiny_llama().bfloat16(), DYNAMIC)


def adapter(folder):
    folder.mkdir()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(2, 32), f"{name}B.weight": torch.ones(64, 2)},
        folder / "adapter_model.safetensors",
    )
    said = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1})
    (folder / "adapter_config.json").write_text(said, encoding="utf-8")
    return folder


WRITERS = {
    "save_pretrained": lambda at: at["model"].save_pretrained(at["out"]),
    "save": lambda at: save(at["model"], at["out"]),
    "save of another model": lambda at: save(at["plain model"], at["out"]),
    "export": lambda at: export(at["fp8"], at["out"]),
    "merge_lora": lambda at: merge_lora(at["fp8"], at["adapter"], at["out"], trained_on="fp8"),
    "quantize_files": lambda at: quantize_files(at["plain"], at["out"], DYNAMIC),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_half_written_remains(tmp_path, writer):
    at = {name: tmp_path / name for name in ("plain", "fp8", "out")} | {"model": converted()}
    at["plain model"] = convert(nn.Sequential(nn.Linear(64, 256)), DYNAMIC)
    tiny_llama().bfloat16().save_pretrained(at["plain"])
    at["model"].save_pretrained(at["fp8"])
    at["adapter"] = adapter(tmp_path / "adapter")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with room_for(12_000), pytest.raises(FP8CheckpointError, match="out could not be written .*; free some space"):
        WRITERS[writer](at)
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    resumable = {tmp_path / "out.partial" / ".manifest.json"} if writer == "quantize_files" else set()
    assert left <= resumable and not at["out"].exists() and not list(tmp_path.glob(".fp8-*"))
    WRITERS[writer](at)
    assert at["out"].is_dir()
