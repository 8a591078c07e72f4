"""quantization_report: what runs in FP8, with which scales, on which kernels, and why the rest does not."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, ops, prepare, quantization_report
from optimum_fp8.ops import Kernel, dispatch


class OwnForward(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), OwnForward(4, 2))


def converted(**options):
    config = FP8Config(**{"target": "cpu", "scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2", **options})
    model = prepare(net(), config)
    model(torch.ones(1, 4))
    return convert(model)


@pytest.fixture
def refusing_kernel():
    """A backend that refuses small batches, preferred to all others while the test runs."""
    before = {op: list(kernels) for op, kernels in dispatch._kernels.items()}

    def refuses(call):
        return "less than 8 rows" if call.x.shape[0] < 8 else None

    reference = next(kernel for kernel in before["linear"] if kernel.backend == "reference")
    ops.register_kernel("linear", Kernel("picky", None, reference.run, refuses))
    yield
    for op, kernels in before.items():
        dispatch._kernels[op][:] = kernels


@pytest.fixture
def rows():
    """The report's rows by module name."""
    return lambda model: {module.name: module for module in quantization_report(model).modules}


@pytest.mark.core
def test_a_converted_model(rows):
    model = converted()
    report, found = quantization_report(model), rows(model)
    assert report.phase == "converted"
    assert [module.name for module in report.quantized] == ["0", "2"]
    first = found["0"]
    assert (first.type, first.quantized, first.reason, first.activations) == ("Linear", True, "selected", "static")
    assert first.weight_scale == (model[0].weight_scale.min().item(), model[0].weight_scale.max().item())
    assert first.input_scale == model[0].input_scale.item()
    assert (found["3"].type, found["3"].quantized) == ("OwnForward", False)
    assert found["3"].reason == "OwnForward has a forward of its own"
    assert found["3"].weight_scale is None and found["3"].activations == ""


def test_a_compiled_model_is_reported_as_what_was_compiled():
    model = converted()
    assert str(quantization_report(torch.compile(model))) == str(quantization_report(model))


@pytest.mark.parametrize(
    "options, index, reason",
    [
        ({"blocklist": {"names": ["^2$"]}}, "2", "blocklist name '^2$'"),
        ({"modules_to_not_convert": ["0"]}, "0", "modules_to_not_convert '0'"),
        ({"allowlist": {"names": ["0"]}}, "2", "not in allowlist"),
    ],
)
def test_reasons(options, index, reason, rows):
    assert rows(converted(**options))[index].reason == reason


@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
def test_activations(scheme, rows):
    found = rows(converted(activation_scheme=scheme))["0"]
    assert found.activations == scheme
    assert (found.input_scale is not None) is (scheme == "static")


def test_before_and_while_measuring(rows):
    model = net()
    assert quantization_report(model).phase == "high precision"
    assert {module.reason for module in rows(model).values()} == {"not prepared"}
    prepare(model, FP8Config())
    assert quantization_report(model).phase == "measuring"
    assert rows(model)["0"].reason == "measuring" and not quantization_report(model).quantized


@pytest.mark.core
def test_calls_are_counted_when_they_happen():
    model = converted()
    assert quantization_report(model).kernels == {}, "calibration does not count"
    for calls in (1, 2):
        model(torch.ones(3, 4))
        report = quantization_report(model)
        assert sum(report.kernels.values()) == 2 * calls
        assert [sum(module.kernels.values()) for module in report.modules] == [calls, calls, 0]
    assert "calls: " in str(report) and "none yet" not in str(report)


def test_a_forced_backend_is_what_is_counted():
    model = converted()
    with ops.backend("reference"):
        model(torch.ones(3, 4))
    assert quantization_report(model).kernels == {"reference": 2}
    assert quantization_report(model).fallbacks == {}


@pytest.mark.core
def test_fallbacks_are_shown_with_their_reason(refusing_kernel):
    model = converted()
    model(torch.ones(3, 4))
    model(torch.ones(8, 4))
    model(torch.ones(16, 4))
    report = quantization_report(model)
    assert report.fallbacks == {"picky: less than 8 rows": 2}
    assert report.kernels["picky"] == 4 and sum(report.kernels.values()) == 6
    assert report.modules[0].fallbacks == {"picky: less than 8 rows": 1}
    assert "fallbacks: picky: less than 8 rows 2" in str(report)


def test_a_copy_counts_its_own_calls():
    model = converted()
    clone = copy.deepcopy(model)
    clone(torch.ones(3, 4))
    assert quantization_report(model).kernels == {}
    assert sum(quantization_report(clone).kernels.values()) == 2


def test_the_dict_is_json(refusing_kernel):
    model = converted()
    model(torch.ones(3, 4))
    report = quantization_report(model)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["phase"] == "converted" and [row["name"] for row in plain["modules"]] == ["0", "2", "3"]
    assert plain["modules"][0]["fallbacks"] == {"picky: less than 8 rows": 1}
    assert plain["modules"][2]["reason"] == "OwnForward has a forward of its own"


@pytest.mark.core
def test_the_table():
    model = converted()
    first, size, empty, header, rule, *rows, second_empty, calls = str(quantization_report(model)).splitlines()
    assert re.fullmatch(r"\d+\.\d% of all parameters in FP8; 2 of 3 candidate modules in FP8; state: converted", first)
    assert size.startswith("parameters and buffers: ") and empty == second_empty == ""
    columns = "module type FP8 parameters activations weight scale input scale kernels reason"
    assert " ".join(header.split()) == columns
    assert set(rule) == {"-", " "}
    assert rows[0].split()[:5] == ["0", "Linear", "yes", "44.1%", "static"]
    assert rows[2].split()[:3] == ["3", "OwnForward", "no"] and rows[2].endswith("has a forward of its own")
    assert calls == "calls: none yet; fallbacks: none"
    assert not any(line != line.rstrip() for line in str(quantization_report(model)).splitlines())


def test_the_share_counts_what_is_no_candidate_too():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16, bias=False)).bfloat16()
    assert quantization_report(model).share == 0
    convert(model, FP8Config(activation_scheme="weight_only"))
    assert quantization_report(model).share == 128 / (80 + 128), "scales are none of the model's parameters"


def test_a_model_without_candidates():
    report = quantization_report(nn.Sequential(nn.ReLU()))
    assert report.modules == [] and "0 of 0" in str(report)


def test_a_converted_part_inside_another_model(rows):
    found = rows(nn.Sequential(converted(), nn.Linear(2, 2)))
    assert found["0.0"].quantized and not found["1"].quantized
