"""Loading, calibrating and saving in one call reads each tensor of the checkpoint once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers.core_model_loading
import transformers.modeling_utils
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config

from .conftest import llama


class Counting:
    """An open file that counts which tensors are read, not looked at."""

    read: Counter[str] = Counter()

    def __init__(self, *args, **kwargs):
        self._file = safe_open(*args, **kwargs)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def get_tensor(self, key):
        Counting.read[key] += 1
        return self._file.get_tensor(key)

    def get_slice(self, key):
        return CountingSlice(key, self._file.get_slice(key))


class CountingSlice:
    def __init__(self, key, view):
        self._key, self._view = key, view

    def __getattr__(self, name):
        return getattr(self._view, name)

    def __getitem__(self, index):
        Counting.read[self._key] += 1
        return self._view[index]


@pytest.mark.parametrize("mode", ["AUTO", "MEASURE"])
def test_each_tensor_is_read_once(save, tmp_path, monkeypatch, mode):
    folder = save(llama())
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        keys = set(file.keys())
    monkeypatch.setattr(Counting, "read", Counter())
    monkeypatch.setattr("safetensors.safe_open", Counting)
    for module in (transformers.modeling_utils, "optimum_fp8.hf.source", "optimum_fp8.checkpoint.native"):
        monkeypatch.setattr(f"{getattr(module, '__name__', module)}.safe_open", Counting)
    config = FP8Config(
        mode=mode, dataset=[{"input_ids": torch.ones(1, 8, dtype=torch.long)}], dump_stats_path=str(tmp_path / "ranges")
    )
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path / "saved")
    assert Counting.read == dict.fromkeys(keys, 1)
