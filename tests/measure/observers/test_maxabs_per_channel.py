"""The observer "maxabs_per_channel": channels of inputs, outputs and weights; the range is the largest of all."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, Measurements, convert, finalize_calibration, prepare


@pytest.fixture
def measured(tmp_path):
    """Measures modules with some inputs, saves, and gives what was read again."""

    def measured(model, *inputs):
        path = tmp_path / "m"
        prepare(model, FP8Config(observer="maxabs_per_channel", dump_stats_path=path, measure_exclude="NONE"))
        for x in inputs:
            model(x)
        finalize_calibration(model)
        return Measurements.load(path)

    return measured


def channels(measurements, module, kind):
    return measurements.tensors[module, kind].statistics().get("maxabs_per_channel")


@pytest.mark.core
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)], ids=["Linear", "Conv1D"])
def test_of_inputs_outputs_and_weights(measured, make):
    model = nn.Sequential(make())
    x = [torch.randn(4, 6), torch.randn(2, 3, 6)]
    weight = model[0].weight.detach() if isinstance(model[0], nn.Linear) else model[0].weight.detach().t()
    outputs = torch.cat([model(each).reshape(-1, 5) for each in x]).detach()
    found = measured(model, *x)
    inputs = torch.cat([each.reshape(-1, 6) for each in x])
    assert torch.equal(channels(found, "0", "input"), inputs.abs().amax(0))
    assert torch.equal(channels(found, "0", "output"), outputs.abs().amax(0))
    assert torch.equal(channels(found, "0", "weight"), weight.abs().amax(1))
    assert found.range("0") == inputs.abs().max() and found.range("0", "weight") == weight.abs().max()
    assert convert(model)[0].input_scale.shape == (1,)


def test_of_a_convolution(measured):
    model = nn.Sequential(nn.Conv2d(3, 7, 3))
    found = measured(model, torch.randn(2, 3, 8, 8))
    assert torch.equal(channels(found, "0", "weight"), model[0].weight.detach().abs().amax((1, 2, 3)))


def test_while_loading_the_weight_is_seen_in_high_precision(tmp_path):
    from transformers import AutoModelForCausalLM

    config = FP8Config(observer="maxabs_per_channel", dataset=[{"input_ids": [5, 6, 7]}])
    name = "examples/llm/tiny_lm"
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    plain = AutoModelForCausalLM.from_pretrained(name).model.layers[0].mlp.down_proj.weight
    observers = model._optimum_fp8_state.measurements.tensors
    seen = observers["model.layers.0.mlp.down_proj", "weight"].statistics()["maxabs_per_channel"]
    assert torch.equal(seen, plain.detach().abs().amax(1).float())


def test_sizes_that_differ_leave_the_whole():
    measurements = Measurements("f", observer="maxabs_per_channel")
    for size in (4, 6, 4):
        measurements.observe("attn", "p", torch.full((2, 3, size), float(size)))
    assert channels(measurements, "attn", "p") is None and measurements.range("attn", "p") == 6


def test_heads_and_channels():
    x, measurements = torch.randn(9, 2, 5), Measurements("f", observer="maxabs_per_channel")
    measurements.observe("attn", "k", x, per_head=True)
    assert torch.equal(channels(measurements, "attn", "k"), x.abs().amax((0, 1)))
    assert torch.equal(measurements.range_per_head("attn", "k"), x.abs().amax((0, 2)))
