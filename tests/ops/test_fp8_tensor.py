"""A tensor in FP8 acts as its high-precision tensor, whatever is done with it."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from optimum_fp8 import ops
from optimum_fp8.cache import FP8Tensor
from optimum_fp8.errors import FP8NotAvailableError

B, H, T, D = 2, 3, 5, 4
SCALES = {"tensor": (1,), "head": (H, 1, 1), "token and head": (B, H, T, 1)}


def fp8(scale: str | tuple[int, ...] = "head", dtype: torch.dtype = torch.float32) -> FP8Tensor:
    codes = (torch.randn(B, H, T, D) * 100).to(torch.float8_e4m3fn)
    return FP8Tensor(codes, torch.rand(SCALES.get(scale, scale)) + 0.5, dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(scale, dtype):
    x = fp8(scale, dtype)
    codes = x.codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = torch.from_numpy(codes * np.broadcast_to(x.scale.numpy(), codes.shape)).to(dtype)
    assert torch.equal(x.dequantize(), expected)
    assert type(x.dequantize()) is torch.Tensor


def test_looks_like_its_high_precision_tensor():
    x = fp8(dtype=torch.bfloat16)
    assert isinstance(x, torch.Tensor) and not x.requires_grad
    assert (x.dtype, x.shape, x.ndim, x.device.type) == (torch.bfloat16, (B, H, T, D), 4, "cpu")
    assert x.stride() == x.codes.stride() and x.is_contiguous() and x.numel() == B * H * T * D
    assert x.is_floating_point() and x.element_size() == 2 and len(x) == B
    assert "FP8Tensor" in repr(x) and "float8_e4m3fn" in repr(x)


FOREIGN = {
    "matmul": lambda x, y: torch.matmul(y, x.transpose(-1, -2)),
    "second of matmul": lambda x, y: y.transpose(-1, -2) @ x,
    "bmm": lambda x, y: torch.bmm(x.reshape(-1, T, D), y.reshape(-1, T, D).mT),
    "baddbmm": lambda x, y: torch.baddbmm(y.reshape(-1, T, D)[:, :, :1], y.reshape(-1, T, D), x.reshape(-1, T, D).mT),
    "einsum": lambda x, y: torch.einsum("bhtd,bhsd->bhts", x, y),
    "linear": lambda x, y: F.linear(x, y[0, 0]),
    "attention": lambda x, y: F.scaled_dot_product_attention(y, x, x, is_causal=True),
    "cat": lambda x, y: torch.cat([x, y], dim=-2),
    "stack": lambda x, y: torch.stack([x, y]),
    "softmax": lambda x, y: x.softmax(-1),
    "add": lambda x, y: y + x,
    "mul": lambda x, y: x * y,
    "negate": lambda x, y: -x,
    "compare": lambda x, y: x > y,
    "where": lambda x, y: torch.where(y > 0, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0),
    "index": lambda x, y: x[torch.tensor([1, 0])],
    "mask": lambda x, y: x[y > 0],
    "index_select": lambda x, y: x.index_select(2, torch.tensor([0, 3])),
    "gather": lambda x, y: x.gather(-1, torch.zeros(B, H, T, 1, dtype=torch.int64)),
    "repeat": lambda x, y: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x, y: x.repeat_interleave(2, dim=1),
    "expanded heads": lambda x, y: x[:, :, None].expand(B, H, 2, T, D).reshape(B, H * 2, T, D),
    "contiguous": lambda x, y: x.transpose(1, 2).contiguous(),
    "clone": lambda x, y: x.clone().add_(1),
    "float64": lambda x, y: x.double(),
    "half": lambda x, y: x.to(torch.float16),
    "sum": lambda x, y: x.sum(),
    "max": lambda x, y: x.max(dim=-1).values,
    "norm": lambda x, y: x.norm(dim=-1),
    "rms_norm": lambda x, y: F.rms_norm(x, (D,), y[0, 0, 0]),
    "pad": lambda x, y: F.pad(x, (0, 0, 1, 0)),
    "roll": lambda x, y: x.roll(1, dims=-2),
    "zeros_like": lambda x, y: torch.zeros_like(x),
    "new_zeros": lambda x, y: x.new_zeros(3),
    "copied from": lambda x, y: y.clone().copy_(x),
    "written from": lambda x, y: y.clone().index_copy_(2, torch.arange(T), x),
    "own operator": lambda x, y: ops.cast_to_fp8(x, torch.ones(1), torch.float8_e4m3fn, 448.0).float(),
    "item": lambda x, y: torch.tensor(x[0, 0, 0, 0].item()),
    "tolist": lambda x, y: torch.tensor(x.tolist()),
    "numpy": lambda x, y: torch.from_numpy(x.numpy()),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("function", FOREIGN)
def test_foreign_operators_see_the_values(function, scale):
    x, y = fp8(scale), torch.randn(B, H, T, D)
    found, expected = FOREIGN[function](x, y), FOREIGN[function](x.dequantize(), y)
    assert type(found) is torch.Tensor and found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found, expected)


VIEWS = {
    "transpose": lambda x: x.transpose(-1, -2),
    "permute": lambda x: x.permute(2, 0, 3, 1),
    "slice": lambda x: x[:, :, 1:4],
    "step": lambda x: x[:, :, ::2, :3],
    "last": lambda x: x[:, :, -1:],
    "select": lambda x: x[:, 1],
    "unsqueeze": lambda x: x[:, :, None],
    "expand": lambda x: x[:, :, None].expand(B, H, 2, T, D),
    "split": lambda x: x.split([3, 2], dim=2)[1],
    "chunk": lambda x: x.chunk(2, dim=-1)[0],
    "unbind": lambda x: x.unbind(0)[1],
    "squeeze": lambda x: x[:1].squeeze(0),
    "split the size": lambda x: x.view(B, H, T, 2, 2),
    "detach": lambda x: x.detach(),
    "mT": lambda x: x.mT,
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("view", VIEWS)
def test_views_stay_fp8_and_share_memory(view, scale):
    x = fp8(scale)
    found, expected = VIEWS[view](x), VIEWS[view](x.dequantize())
    assert type(found) is FP8Tensor and found.shape == expected.shape
    assert torch.equal(found.dequantize(), expected)
    assert found.codes.untyped_storage().data_ptr() == x.codes.untyped_storage().data_ptr()
    assert found.scale.numel() <= B * H * T


@pytest.mark.parametrize("scale", ["tensor", "head"])
def test_heads_merged_into_the_batch_stay_fp8(scale):
    x = fp8(scale)
    found = x.view(B * H, T, D)
    assert type(found) is FP8Tensor and torch.equal(found.dequantize(), x.dequantize().view(B * H, T, D))


def test_dimensions_of_different_scales_cannot_be_merged():
    x = fp8((B, H, T, 1))
    found = x.view(B, H, T * D)
    assert type(found) is torch.Tensor and torch.equal(found, x.dequantize().view(B, H, T * D))


@given(st.lists(st.sampled_from(["t", "p", "s", "u", "e", "v", "x"]), max_size=5), st.sampled_from(list(SCALES)))
def test_any_chain_of_views(chain, scale):
    steps = {
        "t": lambda x: x.transpose(0, -1),
        "p": lambda x: x.movedim(0, 1),
        "s": lambda x: x[..., 1:] if x.shape[-1] > 1 else x,
        "u": lambda x: x.unsqueeze(1),
        "e": lambda x: x[None].expand(2, *x.shape),
        "v": lambda x: x.flatten(0, 1),
        "x": lambda x: x[0] if x.ndim > 2 else x,
    }
    x = fp8(scale)
    found, expected = x, x.dequantize()
    for step in chain:
        found, expected = steps[step](found), steps[step](expected)
    assert found.shape == expected.shape and torch.equal(found + 0, expected)


@pytest.mark.parametrize("write", ["add_", "zero_", "copy_", "setitem", "out"])
def test_writing_into_it_is_refused(write):
    x, y = fp8(), torch.randn(B, H, T, D)
    with pytest.raises(FP8NotAvailableError, match="read-only.*clone"):
        if write == "setitem":
            x[:, 0] = 1
        elif write == "out":
            torch.add(y, y, out=x)
        else:
            getattr(x, write)(*() if write == "zero_" else (y,))


def test_gradients_flow_past_it():
    x, query = fp8(), torch.randn(B, H, T, D, requires_grad=True)
    (query @ x.mT).sum().backward()
    assert torch.allclose(query.grad, x.dequantize().sum(-2, keepdim=True).expand_as(query))


def test_copies_own_their_memory():
    x = fp8("token and head", torch.bfloat16)
    other = copy.deepcopy(x)
    x.codes.view(torch.uint8).zero_()
    assert type(other) is FP8Tensor and other.dtype == torch.bfloat16 and other.dequantize().abs().sum() > 0


def test_empty():
    x = FP8Tensor(torch.empty(0, dtype=torch.float8_e4m3fn), torch.ones(H, 1, 1), torch.bfloat16)
    assert x.dequantize().shape == (0,) and x.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("scale", SCALES)
def test_made_and_used_in_a_compiled_function(scale):
    x, query = fp8(scale), torch.randn(B, H, T, D)

    def attend(codes, scale, query):
        key = FP8Tensor(codes, scale, torch.float32)
        return F.scaled_dot_product_attention(query, key[:, :, 1:], key[:, :, 1:]) + key.transpose(1, 2).sum()

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x.codes, x.scale, query), attend(x.codes, x.scale, query), atol=1e-5, rtol=1e-5)
    passed = torch.compile(lambda key, query: query @ key.mT, backend="aot_eager", fullgraph=True)
    assert torch.allclose(passed(x, query), query @ x.dequantize().mT, atol=1e-4, rtol=1e-5)


def test_a_gradient_passes_through_a_product_with_it():
    tensor = FP8Tensor(torch.randn(8, 6).to(torch.float8_e4m3fn), torch.rand(8, 1) + 0.1, torch.float32)
    x = torch.randn(3, 6, requires_grad=True)
    found, expected = (
        torch.autograd.grad(torch.nn.functional.linear(x, weight).square().sum() + (x @ weight.t()[:, 2:5]).sum(), x)
        for weight in (tensor, tensor.dequantize())
    )
    assert torch.equal(found[0], expected[0])
