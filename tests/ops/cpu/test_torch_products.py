"""Where torch's products are taken for ours: by facts about the processor and by what is exact."""

import platform
from types import SimpleNamespace

import pytest
import torch
from grids import over

from optimum_fp8.ops.arguments import LinearCall
from optimum_fp8.ops.cpu import torch_products
from optimum_fp8.ops.cpu.torch_products import (
    FROM_ROWS,
    NEVER,
    FromRows,
    are_powers_of_two,
    dtype_of_panels,
    from_rows,
    has_fast_bfloat16,
)

BF16, FP32 = torch.bfloat16, torch.float32
X86, ARM = "x86_64", "aarch64"


@pytest.fixture(autouse=True)
def rounding_once(monkeypatch):
    """As on processors with instructions for bfloat16."""
    monkeypatch.setattr(torch_products, "rounds_once", lambda: True)


def library(best, too_new=()):
    return SimpleNamespace(best=best, too_new=list(too_new))


@over(
    case=[
        ("avx512bf16", (), X86, False, True),
        ("avx512amx", (), X86, True, True),
        ("avx512vbmi", (), X86, True, True),  # a compiler that does not know AMX
        ("avx512vbmi", ("avx512amx",), X86, True, False),  # the system refuses tiles, to torch too
        ("avx512vbmi", ("avx512amx",), X86, False, False),
        ("avx2", ("avx512amx", "avx512bf16"), X86, False, False),
        ("portable", (), ARM, False, True),
    ]
)
def test_what_is_known_of_processors(case):
    best, too_new, machine, tiles, expected = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "machine", lambda: machine)
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        assert has_fast_bfloat16(library(best, too_new)) == expected
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # macOS
        assert not has_fast_bfloat16(library(best, too_new))
        assert from_rows(library(best, too_new), "portable") == FromRows(in_float32=FROM_ROWS["portable"].in_float32)
        assert min(from_rows(library(best, too_new), "avx2")) == NEVER


def call_of(weight_scale=(1,), input_scale=None, dtype=BF16, bias=None, factor=1.0, arithmetic="fused"):
    weight, x = torch.zeros(256, 256).to(torch.float8_e4m3fn), torch.zeros(20, 256, dtype=dtype)
    scales = [None if shape is None else torch.full(shape, factor) for shape in (weight_scale, input_scale)]
    return LinearCall(x, weight, *scales, None if bias is None else torch.zeros(256, dtype=bias), 448.0, arithmetic)


@over(
    case=[
        (call_of(factor=0.7), BF16),
        (call_of((1,), (1,), factor=0.7), BF16),
        (call_of((256, 1)), BF16),
        (call_of((2, 2), (20, 8)), BF16),
        (call_of((256, 1), factor=0.7), FP32),
        (call_of((1,), (20, 1), factor=0.7), FP32),
        (call_of(dtype=FP32), FP32),
        (call_of(dtype=torch.float16, input_scale=(1,)), FP32),
        (call_of(bias=BF16), BF16),
        (call_of(bias=FP32), FP32),
        (call_of(bias=FP32, arithmetic="gaudi"), BF16),
        (call_of(factor=2.0**-70), FP32),
        (call_of(factor=float("nan")), FP32),
    ]
)
def test_what_is_exact_in_bfloat16(case):
    call, expected = case
    assert dtype_of_panels(call, 20, FromRows(20, 20, 20)) == expected
    assert dtype_of_panels(call, 19, FromRows(20, 20, 20)) is None
    assert dtype_of_panels(call, 20, FromRows(20, 20)) == (BF16 if expected == BF16 else None)


def test_rounding_twice_is_found(monkeypatch):
    monkeypatch.undo()
    torch_products.rounds_once.cache_clear()
    try:
        addmm = torch.addmm
        with monkeypatch.context() as patch:
            patch.setattr(torch, "addmm", lambda bias, x, w, alpha: addmm(torch.zeros_like(bias), x, w) * alpha + bias)
            assert not torch_products.rounds_once()
            assert dtype_of_panels(call_of(), 20, FromRows(20, 20, 20)) == FP32
    finally:
        torch_products.rounds_once.cache_clear()


def test_torch_told_otherwise(monkeypatch):
    matmul, least = torch.backends.mkldnn.matmul, FromRows(20, 20, 20)
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        assert dtype_of_panels(call_of(dtype=FP32), 20, least) is None
        assert dtype_of_panels(call_of(), 20, least) == BF16
    finally:
        matmul.fp32_precision = before
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace(enabled=False, matmul=matmul))
    assert dtype_of_panels(call_of(), 20, least) == FP32


def test_which_scales_are_powers_of_two():
    for good in (2.0**-63, 0.25, 1.0, 2.0**64):
        assert are_powers_of_two(torch.tensor([good, 1.0]))
    for bad in (2.0**-64, 2.0**65, 3.0, 1.0000001, -1.0, 0.0, torch.inf, torch.nan):
        assert not are_powers_of_two(torch.tensor([1.0, bad]))
    assert are_powers_of_two(torch.tensor([1.0, 3.0]).repeat(4)[::2])
