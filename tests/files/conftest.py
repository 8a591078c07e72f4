"""Folders of tiny models, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hf.conftest import *  # noqa: F403
from safetensors import safe_open
from unsealed import unsealed

WEIGHT_ONLY = {"activation_scheme": "weight_only"}
DYNAMIC = {"activation_scheme": "dynamic"}
CHANNELS = DYNAMIC | {"scale_method": "act_maxabs_pow2_weights_pcs_opt_pow2", "quantize_lm_head": True}


def tensors(folder: Path | str) -> dict[str, tuple[str, tuple[int, ...], torch.dtype, bytes]]:
    """The file, shape, dtype and bytes of each tensor in a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                found[key] = (path.name, tuple(tensor.shape), tensor.dtype, data)
    return found


def records(folder: Path | str) -> list[dict]:
    """What the files say, without the digests: one file's where each is written by itself, and else those of all."""
    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.append(unsealed(file.metadata()))
    return found


def said(folder: Path | str, name: str = "config.json") -> dict:
    return json.loads((Path(folder) / name).read_text())


def contents(folder: Path | str) -> dict[str, bytes]:
    """All files of a folder, to the byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
