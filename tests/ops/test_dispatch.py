"""Which kernel runs: preference, refusal with a reason, forcing a backend, and the counts that tell what happened."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError
from optimum_fp8.ops import dispatch

MARK = 123.0


@pytest.fixture
def registry(monkeypatch):
    """Only the reference is there, and kernels registered by a test are gone after it."""
    only_reference = {op: [kernels[-1]] for op, kernels in dispatch._kernels.items()}
    monkeypatch.setattr(dispatch, "_kernels", only_reference)


def refuse_floats(call):
    return "float32 inputs" if call.x.dtype == torch.float32 else None


def marking_kernel(name="quick", devices=("cpu",), refuses=refuse_floats):
    """A kernel for linear whose results can be told from the reference's."""
    return ops.Kernel(
        name, devices, lambda call: call.x.new_full((*call.x.shape[:-1], len(call.weight)), MARK), refuses
    )


def linear(dtype=torch.bfloat16, record=None):
    weight = torch.ones(2, 3).to(torch.float8_e4m3fn)
    x, scale = torch.ones(1, 3, dtype=dtype), torch.ones(1)
    return ops.linear(x, weight, scale, None, None, full_scale=448.0, record=record)


def result_of(output):
    return output.unique().item()


def test_the_reference_serves_every_operator():
    assert {"cast_to_fp8", "cast_from_fp8", "dynamic_scale", "linear", "conv"} <= set(dispatch._kernels)
    assert "reference" in ops.backends()
    for kernels in dispatch._kernels.values():
        assert kernels[-1].backend == "reference" and kernels[-1].devices is None


def test_a_registered_kernel_is_preferred(registry):
    ops.register_kernel("linear", marking_kernel())
    assert result_of(linear()) == MARK
    assert "quick" in ops.backends()


def test_the_latest_kernel_is_preferred(registry):
    ops.register_kernel("linear", marking_kernel())
    ops.register_kernel("linear", marking_kernel("other", refuses=lambda call: "never"))
    record = ops.CallRecord()
    assert result_of(linear(record=record)) == MARK
    assert record.kernels == {("linear", "quick"): 1}
    assert record.fallbacks == {("linear", "other", "never"): 1}


def test_registering_again_replaces(registry):
    ops.register_kernel("linear", marking_kernel())
    ops.register_kernel("linear", marking_kernel(refuses=lambda call: "changed its mind"))
    assert [kernel.backend for kernel in dispatch._kernels["linear"]].count("quick") == 1
    assert result_of(linear()) == 3.0


def test_refusal_falls_back_and_is_counted(registry):
    ops.register_kernel("linear", marking_kernel())
    record = ops.CallRecord()
    assert result_of(linear(torch.float32, record)) == 3.0
    assert result_of(linear(torch.bfloat16, record)) == MARK
    assert result_of(linear(torch.float32, record)) == 3.0
    assert record.kernels == {("linear", "reference"): 2, ("linear", "quick"): 1}
    assert record.fallbacks == {("linear", "quick", "float32 inputs"): 2}


def test_a_longer_way_of_the_kernel_that_runs_is_counted_and_not_prepared(registry):
    quick = marking_kernel(refuses=lambda call: None)
    of_one_row = {"slower": lambda call: None if call.x.shape[0] == 1 else "several rows"}
    ops.register_kernel("linear", replace(quick, prepare=lambda call: quick.run, **of_one_row))
    record, weight, one = ops.CallRecord(), torch.ones(2, 3).to(torch.float8_e4m3fn), torch.ones(1)
    for rows in (2, 2, 1):
        with torch.no_grad():
            found = ops.linear(torch.ones(rows, 3), weight, one, None, None, full_scale=448.0, record=record)
        assert result_of(found) == MARK
        assert bool(record.prepared) == (rows == 1), "what was prepared would not be counted"
    assert record.kernels == {("linear", "quick"): 3}
    assert record.fallbacks == {("linear", "quick", "several rows"): 2}


def test_a_kernel_of_another_device_is_no_fallback(registry):
    ops.register_kernel("linear", marking_kernel(devices=("hpu",)))
    record = ops.CallRecord()
    assert result_of(linear(record=record)) == 3.0
    assert not record.fallbacks


def test_forcing_the_reference(registry):
    ops.register_kernel("linear", marking_kernel())
    record = ops.CallRecord()
    with ops.backend("reference"):
        assert result_of(linear(record=record)) == 3.0
    assert result_of(linear(record=record)) == MARK
    assert not record.fallbacks


def test_forcing_runs_a_backend_on_any_device(registry):
    ops.register_kernel("linear", marking_kernel(devices=("hpu",)))
    with ops.backend("quick"):
        assert result_of(linear()) == MARK


def test_forced_backends_nest_and_end_with_an_error(registry):
    ops.register_kernel("linear", marking_kernel())
    with ops.backend("reference"):
        with pytest.raises(RuntimeError, match="mine"), ops.backend("quick"):
            assert result_of(linear()) == MARK
            raise RuntimeError("mine")
        assert result_of(linear()) == 3.0
    assert result_of(linear()) == MARK


def test_forced_backend_that_refuses_raises(registry):
    ops.register_kernel("linear", marking_kernel())
    record = ops.CallRecord()
    with ops.backend("quick"), pytest.raises(FP8NotAvailableError, match="'quick' cannot run 'linear'.*float32 inputs"):
        linear(torch.float32, record)
    assert not record.kernels


def test_forced_backend_without_the_operator_raises(registry):
    ops.register_kernel("linear", marking_kernel())
    message = "'quick' has no kernel for 'cast_to_fp8'"
    with ops.backend("quick"), pytest.raises(FP8NotAvailableError, match=message):
        ops.cast_to_fp8(torch.ones(1), torch.ones(1), torch.float8_e4m3fn, 448.0)


def test_unknown_backend():
    with (
        pytest.raises(FP8ConfigError, match="'referense' is unknown: did you mean 'reference'"),
        ops.backend("referense"),
    ):
        pass


def test_backend_of_other_machines(registry, monkeypatch):
    monkeypatch.setattr(dispatch, "_missing", {"cpu_wide": "this processor is narrow"})
    message = "'cpu_wide' cannot run: this processor is narrow; here run reference"
    with pytest.raises(FP8NotAvailableError, match=message), ops.backend("cpu_wide"):
        pass


def test_why_the_reference_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "_missing", {})
    monkeypatch.setattr(dispatch, "_missing_devices", {})
    assert ops.why_reference() is None and ops.missing("cpu") is None
    dispatch.note_missing("quick", "this processor is narrow")
    assert ops.why_reference() is None and ops.missing("quick") == "this processor is narrow"
    dispatch.note_missing("hpu", "the bridge was not found", device=True)
    assert ops.why_reference() == ops.why_reference("hpu") == ops.missing("hpu") == "the bridge was not found"
    assert ops.why_reference("cpu") is None
    dispatch.note_missing("cpu", "there is no compiler", device=True)
    assert ops.why_reference() == "the bridge was not found; there is no compiler"


def test_packages_with_a_register_function_are_backends(tmp_path):
    """A new backend is a new folder: nothing else names it."""
    package = shutil.copytree(Path(ops.__file__).parents[1], tmp_path / "optimum_fp8")
    for folder in ("other", "no_backend"):
        (package / "ops" / folder).mkdir()
    (package / "ops/no_backend/__init__.py").write_text("")
    (package / "ops/other/__init__.py").write_text(
        "from ..dispatch import Kernel, register_kernel\n"
        "def register():\n"
        "    register_kernel('maxabs', Kernel('other', ('cpu',), lambda call: call.x.new_full((1,), 7.0)))\n"
    )
    code = "import torch; from optimum_fp8 import ops; print(ops.backends(), ops.maxabs(torch.ones(3)).item())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "'other'" in done.stdout and done.stdout.split()[-1] == "7.0"


def test_counts_are_kept_per_record(registry):
    first, second, idle = ops.CallRecord(), ops.CallRecord(), ops.CallRecord()
    linear(record=first)
    linear(record=second)
    linear(record=second)
    linear()
    assert first.kernels == {("linear", "reference"): 1}
    assert second.kernels == {("linear", "reference"): 2}
    assert not idle.kernels


def test_convolutions_are_counted_too(registry):
    record = ops.CallRecord()
    ops.conv(
        torch.ones(1, 1, 4, 4),
        torch.ones(1, 1, 1, 1).to(torch.float8_e4m3fn),
        torch.ones(1),
        None,
        None,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
        full_scale=448.0,
        record=record,
    )
    assert record.kernels == {("conv", "reference"): 1}


def test_unknown_words_are_refused():
    x, weight, one = torch.ones(1, 4), torch.ones(3, 4).to(torch.float8_e4m3fn), torch.ones(1)
    with pytest.raises(FP8ConfigError, match="arithmetic.*did you mean 'gaudi'"):
        ops.linear(x, weight, one, one, None, full_scale=448.0, arithmetic="gaudy")
    options = {"group": 0, "divisor": 224.0, "fp8_config": "E4M3", "target": "cpu", "hp_dtype": torch.bfloat16}
    with pytest.raises(FP8ConfigError, match="rounding.*did you mean 'pow2'"):
        ops.dynamic_scale(x, rounding="pow", **options)


def test_a_kernel_for_an_operator_that_does_not_exist_is_refused():
    with pytest.raises(FP8ConfigError, match="operator 'linaer' is unknown: did you mean 'linear'"):
        ops.register_kernel("linaer", marking_kernel())
