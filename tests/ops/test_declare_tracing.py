"""Tracers, transforms and modes see every call of an operator: what they record computes right on other inputs, or they
are refused."""

import io

import pytest
import torch
from grids import over
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from optimum_fp8 import FP8Config, convert
from optimum_fp8.errors import FP8NotAvailableError

SCHEMES = ["dynamic", "weight_only", "static"]


def model(scheme, conv=False, dtype=torch.float32):
    """A converted model that was called, so that its calls are known, and an input and another."""
    layers = (nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)) if conv else (nn.Linear(64, 32), nn.Linear(32, 64))
    shapes = ((2, 4, 9, 9), (3, 4, 12, 7)) if conv else ((4, 64), (2, 5, 64))
    options = {"scale_method": "unit_scale"} if scheme == "static" else {}
    config = FP8Config(activation_scheme=scheme, quantize_lm_head=True, **options)
    made = convert(nn.Sequential(layers[0], nn.GELU(), layers[1]).to(dtype), config).eval()
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    with torch.no_grad():
        made(inputs[0])
    return made, *inputs


@pytest.mark.core
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@over(scheme=SCHEMES, conv=[False, True], dtype=[torch.float32, torch.bfloat16])
def test_jit_trace_computes_on_other_inputs(scheme, conv, dtype):
    made, x, other = model(scheme, conv, dtype)
    with torch.no_grad():
        traced = torch.jit.trace(made, x)
        for each in (other, x, other * 3):
            assert torch.equal(traced(each), made(each))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_with_gradients_on():
    made, x, other = model("dynamic")
    assert torch.equal(torch.jit.trace(made, x)(other.reshape(-1, 64)), made(other.reshape(-1, 64)))


@over(scheme=SCHEMES, conv=[False, True])
def test_make_fx_and_export(scheme, conv):
    made, x, other = model(scheme, conv)
    with torch.no_grad():
        assert torch.equal(make_fx(made)(x)(-x), made(-x))
        for strict in (False, True):
            assert torch.equal(torch.export.export(made, (x,), strict=strict).module()(x * 2), made(x * 2))


def test_vmap_is_a_loop_of_calls():
    made, x, _ = model("weight_only")
    with torch.no_grad():
        assert torch.equal(torch.vmap(made)(x), torch.stack([made(row) for row in x]))


@over(scheme=SCHEMES)
def test_gradients_forwards_are_refused(scheme):
    made, x, _ = model(scheme)
    with pytest.raises(FP8NotAvailableError, match="no gradient through optimum_fp8::"):
        torch.func.jvp(made, (x,), (x,))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(FP8NotAvailableError, match="no gradient"):
        made(forward_ad.make_dual(x, x))


def test_symbolic_tracing_is_refused():
    made, _, _ = model("dynamic")
    with pytest.raises(FP8NotAvailableError, match=r"0: .* was given a Proxy, as torch.fx.symbolic_trace does"):
        torch.fx.symbolic_trace(made)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_is_refused():
    made, x, _ = model("dynamic")
    with pytest.raises(FP8NotAvailableError, match=r"cannot be exported to ONNX: export what optimum_fp8.dequantize"):
        torch.onnx.export(made, (x,), io.BytesIO(), dynamo=False)


@over(strict=[False, True])
def test_onnx_is_refused_while_exporting_a_graph(monkeypatch, strict):
    """As torch.onnx.export(dynamo=True) does it, which needs packages of its own."""
    made, x, _ = model("dynamic")
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(Exception, match="cannot be exported to ONNX"):
        torch.export.export(made, (x,), strict=strict)


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_function_modes_and_counters_see_the_operators():
    made, x, _ = model("weight_only")
    with torch.no_grad():
        expected = made(x)
        with Functions() as mode:
            assert torch.equal(made(x), expected)
        assert sum("optimum_fp8.linear" in name for name in mode.names) == 2
        with FlopCounterMode(display=False):
            assert torch.equal(made(x), expected)
