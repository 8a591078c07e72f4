"""INC itself reads what is written for it, and comes to the same scales; in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hf.conftest import llama
from safetensors.torch import load_file, save_file
from torch import nn

from optimum_fp8 import FP8Config, Measurements, convert, finalize_calibration, prepare
from optimum_fp8.lifecycle import inc_scales, weights_of
from optimum_fp8.measure import read_inc
from optimum_fp8.measure.inc import nodes_of, write_inc
from optimum_fp8.modules import fp8_modules

ROOT = Path(__file__).parents[2]
PER_CHANNEL = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
METHODS = ["maxabs_pow2", "maxabs_arbitrary", PER_CHANNEL, "unit_scale"]
MEASURED = [method for method in METHODS if method != "unit_scale"]  # INC needs no files for it, and writes none


def sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False)).bfloat16()


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    model = llama().bfloat16().eval()
    model.set_attn_implementation("eager")
    return model


MODELS = {"sequential": sequential, "llama": tiny_llama}


def config(stats: Path, **options) -> FP8Config:
    options = {
        "target": "cpu",
        "activation_scheme": "static",
        "use_qdq": True,
        "dump_stats_path": str(stats),
        **options,
    }
    return FP8Config(**options)


def inputs_of(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 128, (2, 12)) if name == "llama" else 3 * torch.randn(20, 16, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models, their measurements as INC's files, and what INC made of them."""
    subprocess.run(["make", "-s", ".venv-inc/.ready"], cwd=ROOT, check=True, capture_output=True)
    python = ROOT / ".venv-inc" / "bin" / "python"
    root = tmp_path_factory.mktemp("inc")
    for name, make in MODELS.items():
        model, folder, x = make(), root / name, inputs_of(name)
        folder.mkdir()
        if name == "llama":
            model.save_pretrained(folder)
        else:
            save_file(model.state_dict(), folder / "model.safetensors")
        save_file({"x": x}, folder / "inputs.safetensors")
        prepare(model, config(folder / "ours"))
        with torch.no_grad():
            model(x)
        measurements = finalize_calibration(model)
        for method in METHODS:
            write_inc(folder / "stats" / method / "m", nodes_of(measurements.tensors).nodes, samples=2)
    environment = {**os.environ, "INC_TARGET_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    worker = Path(__file__).with_name("inc_worker.py")
    run = subprocess.run([python, worker, root, *METHODS], capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr[-4000:]
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", MEASURED)
def test_inc_comes_to_our_scales(made, name, method):
    incs = read_inc(made / name / "stats" / method / "m").scales[method.upper()]
    model = convert(MODELS[name](), config(made / name / "ours", scale_method=method, mode="QUANTIZE"))
    modules = fp8_modules(model)
    assert modules.keys() == incs.keys() and len(modules) == {"sequential": 2, "llama": 14}[name]
    for module, ours in modules.items():
        weight = incs[module].params["weight"]
        assert ours.input_scale.item() == incs[module].inputs[0].item(), module
        assert torch.equal(
            ours.weight_scale.flatten(), (weight[0] if isinstance(weight, dict) else weight).flatten()
        ), module


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", MEASURED)
def test_the_scale_files_we_write_are_those_that_inc_writes(made, name, method):
    incs = read_inc(made / name / "stats" / method / "m").scales[method.upper()]
    nodes = nodes_of(Measurements.load(made / name / "ours").tensors).nodes
    ours = inc_scales(
        {each: nodes[each] for each in incs}, FP8Config(scale_method=method, target="cpu"), weights_of(MODELS[name]())
    )
    assert repr(ours) == repr(incs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "maxabs_arbitrary"])
def test_both_compute_the_same(made, name, method):
    """But with arbitrary scales, whose inverse INC rounds to bfloat16 and we do not."""
    model = convert(MODELS[name](), config(made / name / "ours", scale_method=method, mode="QUANTIZE"))
    incs = load_file(made / name / f"{method}.safetensors")["y"]
    with torch.no_grad():
        ours, original = (getattr(out := each(inputs_of(name)), "logits", out) for each in (model, MODELS[name]()))
    if name == "sequential":
        assert torch.equal(ours, incs)
    else:  # sums in another order may end an ulp apart, and where that is rounded to FP8 a step of it
        error, rounding = (ours - incs).float().norm(), (ours - original).float().norm()
        assert error < 0.25 * rounding
