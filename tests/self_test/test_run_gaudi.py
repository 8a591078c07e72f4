"""The self-test on Gaudi's kernels, over an emulated bridge."""

from __future__ import annotations

import pytest
from grids import slow_but

from optimum_fp8 import ops
from optimum_fp8.ops import dispatch
from optimum_fp8.ops.hpu import casts
from optimum_fp8.self_test import selftest
from optimum_fp8.test_utils import gaudi


def found_on(chip, bridge=gaudi.BRIDGES[-1], **options):
    with gaudi.emulated(chip, bridge=bridge) as device:
        return selftest("cpu", target=chip, backend="hpu", **options), device


@pytest.mark.parametrize(
    ("chip", "bridge"),
    slow_but([("gaudi2", "1.19"), ("gaudi2", "1.24"), ("gaudi3", "1.24")], ("gaudi3", "1.24")),
)
def test_every_kernel_passes(chip, bridge):
    report, _ = found_on(chip, bridge)
    assert report.ok and set(report.kernels) == {"hpu"}, str(report)
    passed = {row.operator for row in report.rows if row.result == "pass"}
    kernels = {op for op, known in dispatch._kernels.items() if any(kernel.backend == "hpu" for kernel in known)}
    lacking = {row.operator for row in report.rows if "is not in this bridge" in row.why}
    assert lacking == ({"experts"} if bridge == "1.19" else set()) and passed == kernels - lacking
    assert all("hpu" in row.why and row.kernel == "" for row in report.rows if row.result == "refused")
    assert report.versions["bridge"] == f"habana_frameworks {bridge}"
    assert "cast_to_fp8_v2 (default, scalar, scalar_list)" in report.versions["torch.ops.hpu"]


def test_all_of_attention_runs_and_steps_instead_of_the_fused_kernel_are_told():
    report, device = found_on("gaudi2", operators=["attention", "attention_weights"])
    assert {(row.result, row.kernel) for row in report.rows} == {("pass", "hpu")}
    assert {call.name for call in device.calls} >= {"fp8_sdpa_recomp_fwd", "softmax_fp8", "fp8_gemm_v2"}
    told = {row.case.removesuffix(", constant scales"): row.why for row in report.rows if row.why}
    reasons = {why.removeprefix("in steps, not in the fused kernel: ") for why in told.values()}
    assert told and all("fused_gaudi" in case and "unfused" not in case for case in told)
    assert all(why.startswith("in steps, not in the fused kernel: ") for why in told.values())
    assert reasons >= {"a soft cap: the kernel has none", "sinks: fp8_fused_sdpa takes none"}
    assert f"[{len(set(told.values()))}] in steps" in str(report)


def test_scales_are_given_as_tensors_and_as_numbers():
    report, device = found_on("gaudi2", operators=["cast_to_fp8"])
    overloads = {call.overload for call in device.calls}
    assert overloads == {"default", "scalar"}
    numbers = [row for row in report.rows if row.case.endswith("constant scales")]
    assert numbers and {row.result for row in numbers} == {"pass"}
    assert sum(call.overload == "scalar" for call in device.calls) == 2 * sum(row.kernel == "hpu" for row in numbers)


@pytest.mark.parametrize("chip", ["gaudi2", "gaudi3"])
def test_the_wrong_sign_convention_fails(chip, monkeypatch):
    """A kernel that hands a scale to the operator of the bridge where it wants the reciprocal."""
    operator = casts.operator

    def wrong(name, overload="default"):
        right = operator(name, overload)
        if name != "cast_to_fp8_v2" or overload != "default":
            return right
        return lambda x, scale, *more: right(x, scale.reciprocal(), *more)

    monkeypatch.setattr(casts, "operator", wrong)
    report, _ = found_on(chip, operators=["cast_to_fp8"])
    failed = {row.case for row in report.failures}
    assert not report.ok and "bf16, hardware scale" in failed
    assert not any(case.endswith("constant scales") for case in failed), "those go by the other overload"


def test_an_operator_that_the_bridge_lacks_is_named(monkeypatch):
    def absent(name, overload="default"):
        return operator(f"{name}_of_tomorrow", overload)

    operator = casts.operator
    monkeypatch.setattr(casts, "operator", absent)
    report, _ = found_on("gaudi3", operators=["cast_from_fp8"])
    assert not report.ok and not report.kernels
    assert any(
        "torch.ops.hpu.cast_from_fp8_of_tomorrow.default is not in this bridge" in row.why for row in report.rows
    )


def test_without_a_bridge_the_device_is_missed():
    assert "torch.ops.hpu has no operators" in ops.missing("hpu")
