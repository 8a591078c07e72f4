"""The self-test passes where the kernels are right, fails where one is wrong, and says what ran."""

from __future__ import annotations

import pytest
import torch
from grids import slow_but

import optimum_fp8
from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError
from optimum_fp8.formats import number_format
from optimum_fp8.ops import dispatch
from optimum_fp8.self_test import selftest
from optimum_fp8.self_test.cases import all_cases
from optimum_fp8.self_test.compare import difference


@pytest.fixture(scope="module")
def report():
    return selftest("cpu")


@pytest.fixture
def register(monkeypatch):
    """Registers a kernel for the time of a test; it is asked before all others."""
    monkeypatch.setattr(dispatch, "_kernels", {op: [*kernels] for op, kernels in dispatch._kernels.items()})

    def register(op, run, backend="novel", **options):
        ops.register_kernel(op, ops.Kernel(backend, ("cpu",), run, **options))

    return register


def reference(op):
    return next(kernel.run for kernel in dispatch._kernels[op] if kernel.backend == "reference")


def rows_of(op, **options):
    return selftest("cpu", operators=[op], **options)


@pytest.mark.core
def test_all_passes_on_this_processor_and_kernels_are_reported(report):
    assert report.ok and report.failures == [], str(report)
    best = ops.cpu.backends()[0]
    assert report.kernels[best] > 100
    native = {row.operator for row in report.rows if row.kernel == best}
    assert native == {op for op, kernels in dispatch._kernels.items() if any(k.backend == best for k in kernels)}
    assert all(row.microseconds > 0 for row in report.rows)


def test_every_operator_has_cases_in_both_formats_and_no_case_is_there_twice():
    for name in ("E4M3", "E5M2"):
        cases = [(case.operator, case.name) for case in all_cases(number_format(name))]
        assert len(set(cases)) == len(cases)
        either = {"maxabs", "histogram"}  # of values in high precision: no format makes a difference
        found = {op: {kernel.backend for kernel in kernels} for op, kernels in dispatch._kernels.items()}
        by_reference = {op for op, backends in found.items() if backends == {"reference"}}
        assert {operator for operator, _ in cases} | either | by_reference == set(dispatch._kernels)


def test_cases_are_the_same_every_time():
    fmt = number_format("E4M3", "gaudi2")
    for one, other in zip(all_cases(fmt), all_cases(fmt), strict=True):
        for left, right in zip(one.call, other.call, strict=True):
            if isinstance(left, torch.Tensor):
                assert difference(left, right, exact=True) == 0, one.name


@pytest.mark.parametrize("backend", ["reference", *ops.cpu.backends()])
@pytest.mark.parametrize("target", slow_but(["gaudi2", "gaudi3", "cuda"], "gaudi2"))
def test_every_backend_passes_with_the_formats_of_every_target(backend, target):
    report = selftest("cpu", target=target, backend=backend)
    assert report.ok and set(report.kernels) == {backend}, str(report)
    assert all(row.why for row in report.rows if row.result == "refused")
    if backend == "reference":
        assert all(row.result == "pass" for row in report.rows)


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("cast_to_fp8", lambda run, call: run(call._replace(scale=1 / call.scale))),
        ("cast_to_fp8", lambda run, call: (call.x * (1 / call.scale.reshape(-1)[0])).to(call.dtype)),
        ("cast_from_fp8", lambda run, call: run(call._replace(scale=1 / call.scale))),
        ("maxabs", lambda run, call: run(call).nextafter(torch.tensor(0.0))),
        ("linear", lambda run, call: run(call._replace(weight_scale=1 / call.weight_scale))),
        ("linear", lambda run, call: run(call._replace(bias=None))),
        ("linear", lambda run, call: run(call) * 1.02),
        ("conv", lambda run, call: run(call._replace(weight=call.weight.float().flip(-1).to(call.weight.dtype)))),
        ("attention", lambda run, call: run(call._replace(k_scale=call.v_scale, v_scale=call.k_scale))),
        ("attention", lambda run, call: run(call._replace(mask=None))),
        ("attention", lambda run, call: run(call._replace(p_scale=None))),
        ("attention_weights", lambda run, call: run(call).roll(1, -1)),
        ("softmax", lambda run, call: run(call._replace(factor=None))),
        ("matmul", lambda run, call: run(call).float()),
        ("dynamic_scale", lambda run, call: run(call._replace(group=0))),
        ("histogram", lambda run, call: (run(call)[0], 2 * run(call)[1])),
        ("experts", lambda run, call: run(call._replace(gate_up=call.gate_up.roll(call.gate_up.shape[1] // 2, 1)))),
        ("grouped_linear", lambda run, call: run(call._replace(experts=call.experts.roll(1)))),
        ("grouped_linear", lambda run, call: run(call._replace(bias=None))),
        ("cast_to_fp8_by_range", lambda run, call: run(call._replace(per_row=not call.per_row))),
    ],
)
def test_a_wrong_kernel_fails(op, wrong, register):
    run = reference(op)
    register(op, lambda call: wrong(run, call))
    report = rows_of(op)
    assert not report.ok and {row.kernel for row in report.rows} <= {"novel", ""}
    assert report.failures and report.summary.startswith("NOT OK on cpu"), str(report)


def test_golden_codes_do_not_ask_the_reference(register):
    """A reference that rounds wrong is found out as well."""
    run = reference("cast_to_fp8")
    register("cast_to_fp8", lambda call: run(call._replace(full_scale=240.0)), backend="reference")
    report = selftest("cpu", backend="reference", operators=["cast_to_fp8"])
    assert "golden codes" in {row.case for row in report.failures if row.fp8_config == "E4M3"}
    assert all(row.difference >= 1 and row.unit == "codes" for row in report.failures)


def test_a_prepared_call_is_tested_as_well(register):
    """The first call of a module is right, the later ones are not."""
    run = reference("linear")
    register("linear", run, prepare=lambda call: lambda later: run(later) + 1)
    assert len(rows_of("linear").failures) == len(rows_of("linear").rows)


def test_what_raises_is_a_row_and_the_others_still_run(register):
    run = reference("linear")

    def breaks(call):
        if call.bias is not None:
            raise RuntimeError("synapse: graph compile failed")
        return run(call)

    register("linear", breaks)
    report = rows_of("linear")
    assert {row.why for row in report.failures} == {"RuntimeError: synapse: graph compile failed"}
    assert all("bias" in row.case and row.kernel == "" and row.microseconds is None for row in report.failures)
    passed = [row for row in report.rows if row.result == "pass"]
    assert passed and all(row.kernel == "novel" for row in passed)


def test_a_fallback_to_the_reference_says_why(register):
    register("linear", reference("linear"), refuses=lambda call: "torch.ops.hpu has no fp8_gemm_v2")
    own = dispatch._kernels["linear"]
    dispatch._kernels["linear"] = [kernel for kernel in own if kernel.backend in ("novel", "reference")]
    for op, why in (
        ("linear", "novel: torch.ops.hpu has no fp8_gemm_v2"),
        ("matmul", "there is no kernel of matmul for cpu"),
    ):
        rows = [row for row in rows_of(op).rows if row.kernel == "reference"]
        assert rows and all(row.why.startswith(why) and row.result == "pass" for row in rows)
    forced = rows_of("linear", backend="novel")
    assert {row.result for row in forced.rows} == {"refused"} and not forced.ok
    assert all("torch.ops.hpu has no fp8_gemm_v2" in row.why for row in forced.rows)


def test_kernels_that_are_missing_are_no_success(monkeypatch):
    monkeypatch.setitem(dispatch._missing_devices, "cpu", "the native CPU kernels were not built")
    report = rows_of("maxabs")
    assert report.failures == [] and not report.ok
    assert "its kernels are missing: the native CPU kernels were not built" in report.summary


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "gpu"}, FP8ConfigError, "device 'gpu' is unknown: did you mean 'hpu'?"),
        ({"device": "cpu", "target": "gaudi4"}, FP8ConfigError, "target='gaudi4' is unknown"),
        ({"device": "cpu", "backend": "hp"}, FP8ConfigError, "backend 'hp' is unknown"),
        (
            {"device": "cpu", "operators": ["linaer"]},
            FP8ConfigError,
            "operator 'linaer' is unknown: did you",
        ),
    ],
)
def test_what_is_unknown_is_an_error(options, error, message):
    with pytest.raises(error) as raised:
        selftest(**options)
    assert message in str(raised.value)


def test_a_backend_that_is_not_here_is_an_error(monkeypatch):
    monkeypatch.setitem(dispatch._missing, "cpu_novel", "this processor has not all of the instructions of novel")
    with pytest.raises(FP8NotAvailableError, match="instructions of novel"):
        selftest("cpu", backend="cpu_novel")


def test_it_is_a_name_of_the_package():
    assert optimum_fp8.selftest is selftest
