"""`Matmul` of models written for Gaudi whose second operand INC leaves as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, ops, prepare
from optimum_fp8.attention import scales_of


class Matmul(nn.Module):
    no_input_quant = True

    def forward(self, x, y, **kwargs):
        return torch.matmul(x, y, **kwargs)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.matmul_qk = Matmul()
        self.scale_bf16_to_fp8 = 0.25

    def forward(self, x, y):
        return self.matmul_qk(x, y)


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 4, *shape, generator=generator).bfloat16() for shape in ((6, 16), (16, 8)))


def quantized(x, y):
    model = prepare(nn.Sequential(Attention()), FP8Config(attention=True, target="gaudi3", scale_method="maxabs_pow2"))
    model[0](x, y)
    return convert(model)[0]


def test_high_precision_stays_high_precision(operands):
    x, y = operands
    module = quantized(x, y)
    scale = scales_of(module.matmul_qk)["q_scale"]
    rounded = ops.cast_from_fp8(ops.cast_to_fp8(x, scale, torch.float8_e4m3fn, 448.0), scale, torch.float32)
    expected = (rounded @ y.float()).bfloat16()
    torch.testing.assert_close(module(x, y), expected, atol=0, rtol=2**-8)
    assert not torch.equal(module(x, y), x @ y)


def test_codes_have_the_scale_of_the_module_around(operands):
    x, y = operands
    module = quantized(x, y)
    codes = (y / 0.25).to(torch.float8_e4m3fn)
    expected = module(x, (codes.float() * 0.25).bfloat16())
    torch.testing.assert_close(module(x, codes), expected, atol=0, rtol=2**-8)
