"""The observer "save": every tensor in a file of its own, whole or not there, and none written over."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from optimum_fp8 import FP8Config, Measurements, convert, finalize_calibration, prepare
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure import Context
from optimum_fp8.measure.observers import save


def measure(folder, *inputs, **options):
    model = prepare(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), FP8Config(dump_stats_path=folder / "m", **options))
    for x in inputs:
        model(x)
    return model


@pytest.mark.core
def test_what_goes_through_is_in_the_files(tmp_path):
    x = [torch.randn(2, 4), torch.randn(5, 4)]
    model = measure(tmp_path / "out", *x, observer="save", measure_exclude="NONE")
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    found = finalize_calibration(model)
    folder = tmp_path / "out" / "tensors"
    names = ["0_input_iter0", "0_input_iter1", "0_output_iter0", "0_output_iter1", "0_weight_iter0"]
    assert sorted(os.listdir(folder)) == [f"{name}.safetensors" for name in names]
    for number, each in enumerate(x):
        assert torch.equal(load_file(folder / f"0_input_iter{number}.safetensors")["input"], each)
        output = load_file(folder / f"0_output_iter{number}.safetensors")["output"]
        torch.testing.assert_close(output, each @ weight.T + bias)
    assert torch.equal(load_file(folder / "0_weight_iter0.safetensors")["weight"], weight)
    assert found.range("0") == torch.cat(x).abs().max(), "and the range is that of maxabs"
    assert convert(model)[0].input_scale.numel() == 1


def test_dtypes_and_layouts_are_kept_and_padding_is_not(tmp_path):
    measurements = Measurements("f", observer="save", context=Context(folder=os.fspath(tmp_path)))
    x = torch.randn(3, 4, 5).bfloat16().transpose(0, 2)
    measurements.observe("a.b/c", "q", x)
    with safe_open(tmp_path / "a.b_c_q_iter0.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("q"), x) and file.metadata() == {"module": "a.b/c", "kind": "q"}
    heads = torch.randn(6, 2, 3)
    measurements.observe("a", "k", heads, per_head=True)
    assert torch.equal(load_file(tmp_path / "a_k_iter0.safetensors")["k"], heads)
    assert torch.equal(measurements.range_per_head("a", "k"), heads.abs().amax((0, 2)))


def test_files_that_are_there_are_kept(tmp_path):
    measure(tmp_path, torch.zeros(1, 4), observer="save", measure_exclude="PARAMS")
    measure(tmp_path, torch.ones(1, 4), observer="save", measure_exclude="PARAMS")
    found = [load_file(tmp_path / "tensors" / f"0_input_iter{n}.safetensors")["input"] for n in range(2)]
    assert [each.max() for each in found] == [0, 1] and len(os.listdir(tmp_path / "tensors")) == 4


def test_a_crash_leaves_no_half_a_file(tmp_path, monkeypatch):
    def fails(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, torch.ones(1, 4), observer="save")
    assert os.listdir(tmp_path / "tensors") == []


def test_another_process_takes_another_number(tmp_path):
    (tmp_path / "a_input_iter0.safetensors.unfinished").touch()  # one that is writing
    (tmp_path / "a_input_iter1.safetensors").touch()  # one that has written
    measurements = Measurements("f", observer="save", context=Context(folder=os.fspath(tmp_path)))
    measurements.observe("a", "input", torch.ones(3))
    assert load_file(tmp_path / "a_input_iter2.safetensors")["input"].tolist() == [1, 1, 1]
    assert len(os.listdir(tmp_path)) == 3


def test_what_was_saved_is_measured_as_by_maxabs_and_read_so(tmp_path):
    model = measure(tmp_path, torch.full((1, 4), 3.0), observer="save")
    finalize_calibration(model)
    config = FP8Config(observer="maxabs", mode="QUANTIZE", dump_stats_path=tmp_path / "m", scale_method="maxabs_pow2")
    fresh = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    fresh.load_state_dict(model.state_dict())
    assert convert(fresh, config)[0].input_scale == 2.0**-5
    assert len(os.listdir(tmp_path / "tensors")) == 2, "reading writes nothing"


def test_no_folder_is_an_error():
    with pytest.raises(FP8MeasurementError, match="observer='save' has no folder"):
        Measurements("f", observer="save").observe("a", "input", torch.ones(1))
