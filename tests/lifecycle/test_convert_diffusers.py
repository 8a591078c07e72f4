"""Models of diffusers in FP8 are about as exact as ones whose weights and inputs are rounded by hooks."""

from __future__ import annotations

import pytest
import torch
from diffusion_models import EACH, inputs, output, steps, tiny
from fake_quantization import fake_quantized
from torch import nn

from optimum_fp8 import FP8Config, Measurements, calibrate, convert, finalize_calibration, prepare, quantization_report
from optimum_fp8.modules import fp8_modules


@pytest.mark.parametrize("name", EACH)
def test_as_exact_as_rounding_by_hand(name):
    exact = output(tiny(name), name)
    model = prepare(tiny(name), FP8Config(target="cpu", scale_method="maxabs_arbitrary"))
    output(model, name)
    convert(model)
    layers = fp8_modules(model)
    linear = [key for key, module in tiny(name).named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    kept = {row.name: row.reason for row in quantization_report(model).modules if not row.quantized}
    assert set(linear) - set(kept) <= set(layers) and all("kept by default" in why for why in kept.values()), kept

    rounded = fake_quantized(tiny(name), layers, lambda other: output(other, name))
    assert 0 < (output(model, name) - exact).norm() <= 1.5 * (output(rounded, name) - exact).norm()


def test_rows_of_tensors_calibrate_a_model_as_calling_it_does(tmp_path):
    name = "stable diffusion 3"
    rows = list(steps(name, torch.float32, 3))

    def ranges(folder: str, config: dict, run) -> Measurements:
        path = str(tmp_path / folder)
        model = prepare(tiny(name), FP8Config(target="cpu", dump_stats_path=path, batch_size=2, **config))
        run(model)
        finalize_calibration(model)
        return Measurements.load(path)

    @torch.no_grad()
    def called(model):
        for row in rows:
            model(**row)

    by_hand = ranges("called", {}, called)
    for folder, dataset in (("rows", rows), ("function", called)):
        by_data = ranges(folder, {"dataset": dataset}, calibrate)
        assert {key for key in by_hand.tensors} == {key for key in by_data.tensors}
        for layer, kind in by_hand.tensors:
            if kind == "input":
                assert by_data.range(layer) == by_hand.range(layer)


def test_only_some_timesteps_have_smaller_ranges(tmp_path):
    """Why calibration has to run all steps of a sample."""
    found = []
    for index, times in enumerate(([500], range(0, 1000, 250))):
        path = str(tmp_path / str(index))
        model = prepare(tiny("ddim"), FP8Config(target="cpu", dump_stats_path=path))
        with torch.no_grad():
            for time in times:
                model(**{**inputs("ddim"), "timestep": time})
        finalize_calibration(model)
        measured = Measurements.load(path)
        found.append({layer: measured.range(layer) for layer, kind in measured.tensors if kind == "input"})
    few, many = found
    assert any(many[layer] > few[layer] for layer in few)
