"""Which kernel runs: preference, refusal with a reason, forcing a backend, and the counts that tell what happened."""

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


def refuse_floats(x, *args):
    return "float32 inputs" if x.dtype == torch.float32 else None


def marking_kernel(name="quick", devices=("cpu",), refuses=refuse_floats):
    """A kernel for linear whose results can be told from the reference's."""
    return ops.Kernel(name, devices, lambda x, weight, *args: x.new_full((*x.shape[:-1], len(weight)), MARK), refuses)


def linear(dtype=torch.bfloat16, owner=0):
    weight = torch.ones(2, 3).to(torch.float8_e4m3fn)
    x, scale = torch.ones(1, 3, dtype=dtype), torch.ones(1)
    return ops.linear(x, weight, scale, None, None, full_scale=448.0, owner=owner)


def result_of(output):
    return output.unique().item()


def test_the_reference_serves_every_operator():
    assert {"cast_to_fp8", "cast_from_fp8", "dynamic_scale", "linear", "conv2d"} <= set(dispatch._kernels)
    assert "reference" in ops.backends()
    for kernels in dispatch._kernels.values():
        assert kernels[-1].backend == "reference" and kernels[-1].devices is None


def test_a_registered_kernel_is_preferred(registry):
    ops.register_kernel("linear", marking_kernel())
    assert result_of(linear()) == MARK
    assert "quick" in ops.backends()


def test_the_latest_kernel_is_preferred(registry):
    ops.register_kernel("linear", marking_kernel())
    ops.register_kernel("linear", marking_kernel("other", refuses=lambda *args: "never"))
    owner = ops.new_owner()
    assert result_of(linear(owner=owner)) == MARK
    assert ops.calls(owner).kernels == {("linear", "quick"): 1}
    assert ops.calls(owner).fallbacks == {("linear", "other", "never"): 1}


def test_registering_again_replaces(registry):
    ops.register_kernel("linear", marking_kernel())
    ops.register_kernel("linear", marking_kernel(refuses=lambda *args: "changed its mind"))
    assert [kernel.backend for kernel in dispatch._kernels["linear"]].count("quick") == 1
    assert result_of(linear()) == 3.0


def test_refusal_falls_back_and_is_counted(registry):
    ops.register_kernel("linear", marking_kernel())
    owner = ops.new_owner()
    assert result_of(linear(torch.float32, owner)) == 3.0
    assert result_of(linear(torch.bfloat16, owner)) == MARK
    assert result_of(linear(torch.float32, owner)) == 3.0
    record = ops.calls(owner)
    assert record.kernels == {("linear", "reference"): 2, ("linear", "quick"): 1}
    assert record.fallbacks == {("linear", "quick", "float32 inputs"): 2}


def test_a_kernel_of_another_device_is_no_fallback(registry):
    ops.register_kernel("linear", marking_kernel(devices=("hpu",)))
    owner = ops.new_owner()
    assert result_of(linear(owner=owner)) == 3.0
    assert not ops.calls(owner).fallbacks


def test_forcing_the_reference(registry):
    ops.register_kernel("linear", marking_kernel())
    owner = ops.new_owner()
    with ops.backend("reference"):
        assert result_of(linear(owner=owner)) == 3.0
    assert result_of(linear(owner=owner)) == MARK
    assert not ops.calls(owner).fallbacks


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
    owner = ops.new_owner()
    with ops.backend("quick"), pytest.raises(FP8NotAvailableError, match="'quick' cannot run 'linear'.*float32 inputs"):
        linear(torch.float32, owner)
    assert not ops.calls(owner).kernels


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


def test_counts_are_kept_per_owner(registry):
    first, second, idle = ops.new_owner(), ops.new_owner(), ops.new_owner()
    assert len({0, first, second, idle}) == 4
    linear(owner=first)
    linear(owner=second)
    linear(owner=second)
    linear()
    assert ops.calls(first).kernels == {("linear", "reference"): 1}
    assert ops.calls(second).kernels == {("linear", "reference"): 2}
    assert not ops.calls(idle).kernels and not ops.calls(0).kernels


def test_convolutions_are_counted_too(registry):
    owner = ops.new_owner()
    ops.conv2d(
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
        owner=owner,
    )
    assert ops.calls(owner).kernels == {("conv2d", "reference"): 1}


def test_unknown_words_are_refused():
    x, weight, one = torch.ones(1, 4), torch.ones(3, 4).to(torch.float8_e4m3fn), torch.ones(1)
    with pytest.raises(FP8ConfigError, match="arithmetic.*did you mean 'gaudi'"):
        ops.linear(x, weight, one, one, None, full_scale=448.0, arithmetic="gaudy")
    options = {"per_token": False, "divisor": 224.0, "fp8_config": "E4M3", "target": "cpu", "hp_dtype": torch.bfloat16}
    with pytest.raises(FP8ConfigError, match="rounding.*did you mean 'pow2'"):
        ops.dynamic_scale(x, rounding="pow", **options)
