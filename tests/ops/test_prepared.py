"""The short way past torch's dispatcher: taken where nothing wants to see the call, and never where torch has moved
what tells so."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_fp8 import ops
from optimum_fp8.ops import prepared

E4M3 = torch.float8_e4m3fn


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    pass


def operands():
    return torch.randn(2, 64), torch.nn.Parameter(torch.randn(8, 64).to(E4M3), requires_grad=False), torch.ones(1)


def test_what_is_plain():
    x, weight, scale = operands()
    plain = (x, weight, scale, None, 1.0, "fused", True, 3, [1, 2], torch.bfloat16)
    assert prepared.is_plain(plain)
    assert not prepared.is_plain((x.as_subclass(Wrapped), weight))
    assert not prepared.is_plain((x, torch.empty(3, device="meta")))
    with torch.no_grad():
        assert prepared.is_plain((x.clone().requires_grad_(), weight))
    assert not prepared.is_plain((x.clone().requires_grad_(), weight))
    with Seen():
        assert not prepared.is_plain(plain)
    assert prepared.is_plain(plain)


def test_modes_and_profilers_see_every_call():
    (x, weight, scale), record = operands(), ops.CallRecord()

    def run():
        with torch.no_grad():
            return ops.linear(x, weight, scale, None, None, full_scale=448.0, record=record)

    run()
    assert "linear" in record.prepared
    with Seen() as seen:
        run()
    assert seen.names == ["optimum_fp8::linear"]
    with torch.profiler.profile() as profile:
        run()
    assert "optimum_fp8::linear" in {event.key for event in profile.key_averages()}
    assert sum(record.kernels.values()) == 3


@pytest.mark.parametrize(
    "torch_without",
    [
        SimpleNamespace(_C=SimpleNamespace(), autograd=torch.autograd),
        SimpleNamespace(_C=SimpleNamespace(_len_torch_dispatch_stack=int), autograd=torch.autograd),
        SimpleNamespace(_C=torch._C, autograd=SimpleNamespace()),
    ],
)
def test_without_torchs_own_questions_every_call_goes_through_the_dispatcher(monkeypatch, torch_without):
    (x, weight, scale), record = operands(), ops.CallRecord()
    with torch.no_grad():
        expected = ops.linear(x, weight, scale, None, None, full_scale=448.0, record=record)
        assert prepared._watchers(torch_without) is None
        monkeypatch.setattr(prepared, "_torch_watches", None)
        assert not prepared.is_plain((x,))
        for _ in range(2):
            found = ops.linear(x, weight, scale, None, None, full_scale=448.0, record=record)
            assert torch.equal(found, expected)
    assert sum(record.kernels.values()) == 3


def test_a_kernel_that_is_registered_later_takes_the_next_call(monkeypatch):
    from optimum_fp8.ops import dispatch

    monkeypatch.setattr(dispatch, "_kernels", {op: list(kernels) for op, kernels in dispatch._kernels.items()})
    (x, weight, scale), record = operands(), ops.CallRecord()
    with torch.no_grad():
        ops.linear(x, weight, scale, None, None, full_scale=448.0, record=record)
        ops.register_kernel("linear", ops.Kernel("mine", ("cpu",), lambda call: call.x.new_full((1,), 7.0)))
        assert ops.linear(x, weight, scale, None, None, full_scale=448.0, record=record).item() == 7.0
