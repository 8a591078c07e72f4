"""Calls like an earlier one of the same module: quicker, and never by what is no longer so."""

import gc
import threading
import weakref

import pytest
import torch
from grids import over
from torch import nn

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ScaleError
from optimum_fp8.ops import dispatch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
K, OUT = 300, 130
SCALES = {"tensor": (1,), "channel": (OUT, 1), "blocks": (2, 3), "groups": (OUT, 10)}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Layer:
    """What an FP8Linear calls `linear` with."""

    def __init__(self, scale="channel", bias=True, fp8=E4M3, static=False):
        self.weight = nn.Parameter(torch.randn(OUT, K).to(fp8), requires_grad=False)
        self.weight_scale = torch.rand(SCALES[scale]) + 0.5
        self.input_scale = torch.tensor([0.25]) if static else None
        self.bias = torch.randn(OUT) if bias else None
        self.record, self.full_scale, self.arithmetic = ops.CallRecord(), 448.0, "fused"

    def __call__(self, x):
        tensors = (self.weight, self.weight_scale, self.input_scale, self.bias)
        return ops.linear(x, *tensors, full_scale=self.full_scale, arithmetic=self.arithmetic, record=self.record)

    def anew(self, x):
        """As if nothing were known."""
        record, self.record = self.record, None
        try:
            return self(x)
        finally:
            self.record = record

    @property
    def is_known(self):
        return "linear" in self.record.prepared


def inputs(*leading, dtype=torch.bfloat16):
    return torch.randn(*leading, K).to(dtype)


@over(scale=SCALES, bias=[False, True], static=[False, True], fp8=[E4M3, E5M2])
def test_later_calls_compute_the_same(scale, bias, static, fp8):
    layer = Layer(scale, bias, fp8, static)
    for x in (inputs(1, 1), inputs(2, 3), inputs(40), inputs(0), inputs(K).t(), inputs(1, 1).half(), inputs(5).half()):
        assert torch.equal(layer(x), layer.anew(x))
        assert layer.is_known
    assert layer.record.kernels == {("linear", ops.cpu.backends()[0]): 7}


def test_scales_of_the_input_come_with_each_call():
    layer = Layer()
    one_a_row = [(inputs(4), (4, 1)), (inputs(1, 3), (1, 3, 1))]
    for x, shape in (*one_a_row, (inputs(4), (1,)), (inputs(4), (4, 10)), (inputs(2), None)):
        layer.input_scale = None if shape is None else torch.rand(shape) + 0.1
        assert torch.equal(layer(x), layer.anew(x))
    layer.input_scale = torch.rand(5, 1)
    with pytest.raises(FP8ScaleError, match=r"expected \(1,\) or \(4, 1\)"):
        layer(inputs(4))


def replace(layer):
    layer.weight = nn.Parameter(torch.randn(OUT, K).to(E4M3), requires_grad=False)


def move(layer):
    layer.weight.data = torch.randn(OUT, K).to(E4M3)


def write(layer):
    layer.weight.view(torch.uint8).copy_(layer.weight.flip(0).view(torch.uint8))


def shrink(layer):
    layer.weight.data, layer.weight_scale.data, layer.bias = layer.weight.data[:64], layer.weight_scale[:64], None


def scale(layer):
    layer.weight_scale *= 2


def rescale(layer):
    layer.weight_scale = torch.ones(1)


def add(layer):
    layer.bias = layer.bias + 1


def drop(layer):
    layer.bias = None


def saturate(layer):
    layer.input_scale, layer.full_scale = torch.tensor([0.001]), 240.0


def round_as_gaudi(layer):
    layer.arithmetic = "gaudi"


def reinterpret(layer):
    layer.weight.data = layer.weight.data.view(E5M2)


@pytest.mark.parametrize(
    "change",
    [reinterpret, replace, move, write, shrink, scale, rescale, add, drop, saturate, round_as_gaudi],
    ids=lambda f: f.__name__,
)
def test_what_changes_is_seen(change):
    layer, x = Layer(), inputs(3)
    before = layer(x)
    change(layer)
    found = layer(x)
    assert torch.equal(found, layer.anew(x)) and not torch.equal(found, before)
    assert torch.equal(layer(x), found)


def test_a_bias_that_comes_later():
    layer, x = Layer(bias=False), inputs(3)
    before, layer.bias = layer(x), torch.ones(OUT)
    assert torch.equal(layer(x), layer.anew(x)) and not torch.equal(layer(x), before)


def test_nothing_is_kept_alive():
    layer = Layer()
    layer(inputs(1))
    assert layer.is_known
    seen = [weakref.ref(layer.weight), weakref.ref(layer.weight_scale), weakref.ref(layer.bias)]
    del layer
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


def test_a_forced_backend_and_a_newly_registered_one_have_their_way(monkeypatch):
    monkeypatch.setattr(dispatch, "_kernels", {op: list(kernels) for op, kernels in dispatch._kernels.items()})
    layer, x = Layer(), inputs(1)
    layer(x)
    with ops.backend("reference"):
        layer(x)
    assert layer.record.kernels["linear", "reference"] == 1
    ops.register_kernel("linear", ops.Kernel("mine", ("cpu",), lambda call: call.x.new_full((1,), 7.0)))
    assert layer(x).item() == 7.0


def test_other_operators_of_the_same_module_are_their_own():
    layer, image = Layer(), torch.randn(1, 3, 5, 5).bfloat16()
    layer(inputs(1))
    kernel, scale = torch.randn(4, 3, 3, 3).to(E4M3), torch.ones(1)
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "full_scale": 448.0}
    found = ops.conv(image, kernel, scale, None, None, **geometry, record=layer.record)
    assert torch.equal(found, ops.conv(image, kernel, scale, None, None, **geometry))


def test_misfits_are_refused_as_ever():
    layer = Layer()
    layer(inputs(1))
    with pytest.raises(RuntimeError):
        layer(torch.randn(1, K - 1).bfloat16())


def test_calls_that_want_a_gradient_are_recorded():
    layer, x = Layer(), inputs(1)
    expected = layer(x)
    with torch.enable_grad():
        y = layer(x.requires_grad_())
        assert torch.equal(y, expected) and y.requires_grad
        y.sum().backward()
    assert x.grad.shape == x.shape and x.grad.count_nonzero()


def test_threads_do_not_share_their_arguments():
    layer, wrong = Layer(), []
    layer(inputs(1))

    @torch.no_grad()
    def run():
        for _ in range(200):
            x = inputs(2)
            if not torch.equal(layer(x), layer.anew(x)):
                wrong.append(x)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
