"""Checkpoints and measurements of format version 1 load for ever, and compute what they computed when written.

`tests/data/version_1/make.py` tells how they were made, and why their results are the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.version_1_models import DATA, load, outputs, sequential, stored
from safetensors.torch import load_file
from torch import nn

from optimum_fp8 import FP8Config, Measurements, convert, ops, prepare, quantization_report

CHECKPOINTS = {  # and how many of their modules are in FP8
    "linear_static": 2,
    "linear_dynamic": 2,
    "linear_per_token": 2,
    "linear_weight_only": 2,
    "linear_gaudi2": 2,
    "linear_e5m2": 2,
    "conv_static": 5,
    "conv_per_channel_gaudi3": 5,
    "llama_static": 7,
    "llama_dynamic": 7,
    "llama_per_head": 7,
    "llama_gaudi2_unfused": 7,
    "llama_cache_only": 7,
    "gpt2_static": 4,
}
MEASURED = ("linear_measured", "conv_measured", "llama_measured")
BACKENDS = ("reference", "free")


@contextmanager
def backend(name: str) -> Iterator[None]:
    with nullcontext() if name == "free" else ops.backend(name):
        yield


def is_exact(name: str) -> bool:
    """Whether every sum is exact in float32, so that all kernels on all machines give the same to the bit."""
    return name.startswith(("linear", "conv", "sequential"))


def assert_as_written(model: nn.Module, name: str) -> None:
    """Compare what `model` computes with what was stored when the fixture was made.

    Roots and exponentials of a transformer differ by an ulp between machines; no FP8 code depends on it.
    """
    inputs, expected = stored(name)
    found = outputs(model, inputs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if is_exact(name) or not value.is_floating_point():
            assert torch.equal(found[key], value), key
        else:
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def cases(names: Any) -> list[tuple[str, str]]:
    """Exact ones with every kernel, the others by the reference, which is what made them."""
    return [(name, backend) for name in names for backend in BACKENDS if is_exact(name) or backend == "reference"]


def test_every_fixture_is_tested():
    assert {path.name for path in DATA.iterdir() if path.is_dir()} - {"__pycache__"} == {
        *CHECKPOINTS,
        *MEASURED,
        "sequential",
    }


@pytest.mark.core
@pytest.mark.parametrize("name, kernels", cases(CHECKPOINTS))
def test_checkpoint(name, kernels, tmp_path):
    model = load(name, DATA / name)
    assert len(quantization_report(model).quantized) == CHECKPOINTS[name]
    with backend(kernels):
        assert_as_written(model, name)
        model.save_pretrained(tmp_path)
        found = outputs(load(name, tmp_path), stored(name)[0])
        for key, value in outputs(model, stored(name)[0]).items():
            assert torch.equal(found[key], value), f"{key}, saved again and loaded"


@pytest.mark.core
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_written_the_same(name, tmp_path):
    load(name, DATA / name).save_pretrained(tmp_path)
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, DATA / name))
    found = {key.replace(".fp8_scales.", "."): value for key, value in found.items()}  # since version 2
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert torch.equal(found[key].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), key


@pytest.mark.core
@pytest.mark.parametrize("name, kernels", cases(MEASURED))
def test_measurements(name, kernels):
    config = FP8Config.from_dict(json.loads((DATA / name / "fp8_config.json").read_text()))
    config = config.replace(dump_stats_path=str(DATA / name / "ranges"))
    measurements = Measurements.load(config.dump_stats_path)
    assert measurements.fingerprint and measurements.tensors
    with backend(kernels):
        assert_as_written(convert(load(name, DATA / name), config), name)


@pytest.mark.parametrize("name", MEASURED)
def test_measurements_are_written_the_same(name, tmp_path):
    path = Path(Measurements.load(DATA / name / "ranges").save(tmp_path / "ranges"))
    found, expected = load_file(path), load_file(DATA / name / path.name)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.core
@pytest.mark.parametrize("kernels", BACKENDS)
def test_state_dict_of_a_model_outside_transformers(kernels):
    config = FP8Config(activation_scheme="static", target="cpu", scale_method="act_maxabs_pow2_weights_pcs_maxabs_pow2")
    model = prepare(sequential(), config)
    model(torch.randn(2, 2, 4, 4))  # weights and ranges are others until the stored ones are loaded
    convert(model).load_state_dict(load_file(DATA / "sequential" / "model.safetensors"))
    with backend(kernels):
        assert_as_written(model, "sequential")
