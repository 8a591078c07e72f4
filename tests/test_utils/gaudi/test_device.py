"""What a device records of calls, and which scales cost nothing."""

import importlib

import pytest
import torch
from grids import over
from torch import nn

from optimum_fp8.test_utils import gaudi
from optimum_fp8.test_utils.gaudi import TensorSpec

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
X, W = torch.ones(2, 4), torch.ones(4, 3).to(E4M3)


def test_calls_are_recorded_by_the_names_of_the_schema(gaudi2):
    torch.ops.hpu.cast_to_fp8_v2(X, torch.tensor([16.0]), False, False, E4M3)
    torch.ops.hpu.fp8_gemm_v2(A=X.to(E4M3), trans_A=False, B=W, trans_B=False, D=None, out_dtype=BF16)
    cast, gemm = gaudi2.calls
    assert (cast.name, cast.overload) == ("cast_to_fp8_v2", "default")
    assert cast.arguments == {
        "input": TensorSpec((2, 4), torch.float32),
        "scale": TensorSpec((1,), torch.float32),
        "stochastic_rounding": False,
        "is_amax": False,
        "dtype": E4M3,
        "scale_shape": None,
    }
    assert cast.scales["scale"][0].values == (16.0,)
    assert gemm.arguments["B"] == TensorSpec((4, 3), E4M3) and gemm.arguments["bias"] is None
    assert gemm.arguments["accumulate"] is False and gemm.scales == {}


def test_lists_are_recorded_element_by_element(gaudi2):
    ones = [torch.ones(())] * 2
    weights = [torch.ones(4, 6).to(E4M3)] * 2, [torch.ones(3, 4).to(E4M3)] * 2
    routing = (torch.tensor([[0], [1]]), torch.ones(2, 1))
    args = (X.to(E4M3), *routing, *weights, ones[0], ones, ones, ones, False, "silu", 0, 1)
    torch.ops.hpu.mixture_of_experts(*args)
    (call,) = gaudi2.calls
    assert call.overload == "fp8_fused_weights" and call.arguments["w12"] == [TensorSpec((4, 6), E4M3)] * 2
    assert {name: len(each) for name, each in call.scales.items()} == {
        "d_scale_hidden_states": 1,
        "d_scale_intermediate_hidden_states": 2,
        "d_scale_w12": 2,
        "d_scale_w3": 2,
    }


def gemm_scale(value, dtype=E4M3):
    torch.ops.hpu.fp8_gemm_v2(X.to(dtype), False, W, False, None, BF16, value, 1.0)


def cast_scale(value, dtype=E4M3):
    torch.ops.hpu.cast_to_fp8_v2(X, value, False, False, dtype)


HARDWARE = {
    ("gaudi2", E4M3): [2.0**-8, 2.0**-4, 1.0, 16.0],
    ("gaudi2", E5M2): [1.0],
    ("gaudi3", E4M3): [2.0**exponent for exponent in range(-56, 8)],
    ("gaudi3", E5M2): [2.0**exponent for exponent in range(-48, 16)],
}


@over(case=list(HARDWARE))
def test_the_sets_of_scales_that_cost_nothing(case):
    powers = [2.0**exponent for exponent in range(-60, 61)]
    with gaudi.emulated(case[0]) as device:
        for scale in powers:
            gemm_scale(scale, case[1])
            cast_scale(1 / scale, case[1])
        products, casts = device.calls[::2], device.calls[1::2]
    assert [s for s, call in zip(powers, products, strict=True) if call.free_scales] == HARDWARE[case]
    assert [s for s, call in zip(powers, casts, strict=True) if call.free_scales] == HARDWARE[case]


def test_a_scale_is_judged_by_the_dtype_it_belongs_to(gaudi2):
    torch.ops.hpu.fp8_gemm_v2(X.to(E5M2), False, W, False, None, BF16, 16.0, 16.0)
    torch.ops.hpu.cast_to_fp8_hybrid(X, torch.tensor(16.0), torch.tensor(16.0))
    torch.ops.hpu.softmax_fp8(X.to(BF16), -1, 1.0, 16.0)
    hardware = [{name: each[0].hardware for name, each in call.scales.items()} for call in gaudi2.calls]
    assert hardware == [
        {"A_scale_inv": False, "B_scale_inv": True},
        {"scale_152": False, "scale_143": True},
        {"input_scale": True, "output_scale": True},
    ]


@pytest.mark.parametrize("scale, hardware", [(1.0, True), (0.3, False), (2.0, False), (0.0, False), (-1.0, False)])
def test_scales_of_gaudi2(gaudi2, scale, hardware):
    gemm_scale(scale)
    (given,) = gaudi2.calls[0].scales["A_scale_inv"]
    assert given.hardware == hardware and given.constant and given.free == hardware


@pytest.mark.core
def test_tensors_cost_nothing_once_marked_as_constant(gaudi2):
    module = nn.Module()
    module.register_buffer("scale_input", torch.tensor([16.0]))
    module.register_buffer("scale_rows", torch.ones(2, 1))
    core = importlib.import_module("habana_frameworks.torch.core")
    torch.ops.hpu.fp8_gemm_v2(X.to(E4M3), False, W, False, None, BF16, module.scale_input, None)
    core.hpu_initialize(module, mark_only_scales_as_const=True)
    for scale in (module.scale_input, module.scale_input.clone(), module.scale_rows, module.scale_rows[:1]):
        torch.ops.hpu.fp8_gemm_v2(X.to(E4M3), False, W, False, None, BF16, scale, None)
    given = [call.scales["A_scale_inv"][0] for call in gaudi2.calls]
    assert [scale.constant for scale in given] == [False, True, False, True, False]
    assert [scale.hardware for scale in given] == [True, True, True, False, True]
    assert [call.free_scales for call in gaudi2.calls] == [False, True, False, False, False]
