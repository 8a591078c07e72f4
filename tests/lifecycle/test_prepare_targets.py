"""Measurements made for one target, or on its device, are those of every other, to the byte."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, finalize_calibration, prepare
from optimum_fp8.measure import measurements_path
from optimum_fp8.modules import fp8_modules
from optimum_fp8.scales import activation_scale
from optimum_fp8.test_utils import gaudi

TARGETS = ("gaudi2", "gaudi3", "cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


def measured(prefix, observer: str, target: str, on: str | None) -> bytes:
    """The file of measurements that are made for a target, perhaps on the device that `auto` finds."""
    with nullcontext() if on is None else gaudi.emulated(on):
        config = FP8Config(mode="MEASURE", target=target, observer=observer, dump_stats_path=str(prefix))
        model = prepare(network(), config)
        with torch.no_grad():
            for seed in range(4):
                model(torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)))
        finalize_calibration(model)
    with open(measurements_path(prefix), "rb") as file:
        return file.read()


@pytest.mark.core
@pytest.mark.parametrize("observer", ["maxabs", "percentile", "mse", "entropy", "moving_average", "maxabs_per_channel"])
def test_the_file_is_the_same_and_serves_every_target(tmp_path, observer):
    files = [measured(tmp_path / target / "m", observer, target, None) for target in TARGETS]
    files += [measured(tmp_path / chip / "auto" / "m", observer, "auto", chip) for chip in ("gaudi2", "gaudi3")]
    assert all(file == files[0] for file in files)
    for target in TARGETS:
        keys = {"mode": "QUANTIZE", "activation_scheme": "static", "target": target, "observer": observer}
        scales = {}
        for made_for in TARGETS:
            model = convert(network(), FP8Config(dump_stats_path=str(tmp_path / made_for / "m"), **keys))
            scales[made_for] = {name: module.input_scale.item() for name, module in fp8_modules(model).items()}
        assert scales["gaudi2"] == scales["gaudi3"] == scales["cpu"]
        if observer in ("maxabs", "maxabs_per_channel"):
            inputs = torch.cat([torch.randn(8, 32, generator=torch.Generator().manual_seed(s)) for s in range(4)])
            expected = activation_scale(inputs.abs().max(), method="maxabs_hw", target=target).item()
            assert scales["cpu"]["0"] == expected
