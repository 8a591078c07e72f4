"""Folders of tiny models in FP8, as we save them and as other engines do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, export, verify
from optimum_fp8.verifying.opened import open_folder

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, Path]:
    """The folder of a model, and of its FP8 checkpoints by their formats."""
    folder = tmp_path_factory.mktemp("verifying")
    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(folder / "base")
    ids = [{"input_ids": torch.randint(0, 64, (2, 16))}]
    config = FP8Config(dataset=ids, target="cpu", scale_method="maxabs_arbitrary", activation_scheme="static")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config)
    model.save_pretrained(folder / "ours", max_shard_size="10KB")
    export(folder / "ours", folder / "compressed-tensors")
    return {name: folder / name for name in ("base", "ours", "compressed-tensors")}


@pytest.fixture
def copied(made, tmp_path) -> Callable[[str], Path]:
    """A copy of one of the folders, to be edited."""
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def edit(folder: Path, change: Callable[..., Any], metadata: dict[str, str] | None = None) -> None:
    """Change the tensors of the file that holds `UP`, and what all files say of them, if `metadata` is given."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            kept = file.metadata()
        tensors = load_file(path)
        if f"{UP}.weight" in tensors:
            change(tensors)
        save_file(tensors, path, metadata=kept if metadata is None else metadata)


def changed(folder, name, change):
    """Change a tensor in the file that holds it, which then has no digests."""
    path = open_folder(folder).tensors[name].path
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    said = json.loads((folder / name).read_text())
    change(said)
    (folder / name).write_text(json.dumps(said))


def told(folder: Path, **options) -> list[str]:
    """The findings, as text."""
    return [str(each) for each in verify(folder, **options)]
