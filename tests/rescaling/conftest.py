"""The packaged language model, measured once and quantized for both Gaudis, and other models in FP8 on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf.conftest import batches, llama, save  # noqa: F401  # fixtures
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config

TINY_LM = Path(__file__).parents[2] / "examples" / "llm" / "tiny_lm"
ATTENTION = {"attention": True, "kv_cache": True}


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(Path(folder).glob("*.safetensors")) for name, each in load_file(path).items()}


def assert_same_tensors(found, expected) -> None:
    """Two checkpoints hold the same bytes under the same names."""
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        mine = ours[name]
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape, name
        assert torch.equal(mine.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.fixture(scope="package")
def lm(tmp_path_factory):
    """Folders of the packaged model, quantized with the same measurements: by name of the target, or method."""
    folder, made = tmp_path_factory.mktemp("lm"), {}
    options = {**ATTENTION, "dump_stats_path": str(folder / "m")}
    data = {"dataset": str(TINY_LM / "calibration.txt"), "num_calibration_samples": 2, "mode": "MEASURE"}
    AutoModelForCausalLM.from_pretrained(TINY_LM, quantization_config=FP8Config(**options, **data))

    def quantized(**more) -> Path:
        name = "-".join(more.values())
        if name not in made:
            config = FP8Config(**options, **more)
            model = AutoModelForCausalLM.from_pretrained(TINY_LM, quantization_config=config)
            model.save_pretrained(folder / name)
            made[name] = folder / name
        return made[name]

    return quantized


@pytest.fixture
def fp8(save, tmp_path):  # noqa: F811
    """Quantizes a small model, or the given one, and returns its folder."""

    def make(config: FP8Config, model=None, name: str = "fp8") -> Path:
        torch.manual_seed(0)
        plain = save(llama() if model is None else model, name=f"{name}-plain")
        loaded = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
        loaded.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
