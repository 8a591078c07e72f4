"""`ops.embedding` against torch's lookup in the dequantized table."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8OperandError, FP8ScaleError
from optimum_fp8.ops.fp8_tensor import FP8Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BACKENDS = [*ops.cpu.backends()[:1], "reference"]


def table(by_row=True, fp8=E4M3):
    codes = (torch.randn(50, 24) * 20).to(fp8)
    return codes, torch.rand((50, 1) if by_row else (1,)) * 0.01 + 1e-4


@over(
    backend=BACKENDS,
    by_row=[True, False],
    fp8=[E4M3, E5M2],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    shape=[(7,), (2, 3), (), (0,), (2, 0)],
    index=[torch.int64, torch.int32],
)
def test_the_rows_of_the_dequantized_table(backend, by_row, fp8, dtype, shape, index):
    codes, scale = table(by_row, fp8)
    places = torch.randint(0, 50, shape, dtype=index)
    expected = F.embedding(places, (codes.float() * scale).to(dtype))
    with ops.backend(backend):
        found = ops.embedding(places, codes, scale, dtype)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_the_lookup_of_torch_in_an_fp8_tensor_gathers_codes(monkeypatch):
    codes, scale = table()
    places = torch.randint(0, 50, (2, 3))
    expected = F.embedding(places, codes.float() * scale)
    monkeypatch.setattr(FP8Tensor, "dequantize", None)  # of the whole table
    assert torch.equal(F.embedding(places, FP8Tensor(codes, scale, torch.float32)), expected)


def test_compiled_it_is_one_node():
    codes, scale = table()
    places = torch.randint(0, 50, (2, 3))
    program = torch.export.export(Lookup(codes, scale), (places,))
    assert [node.target for node in program.graph.nodes if "embedding" in str(node.target)] == [
        torch.ops.optimum_fp8.embedding.default
    ]
    assert torch.equal(program.module()(places), ops.embedding(places, codes, scale, torch.bfloat16))


class Lookup(torch.nn.Module):
    def __init__(self, codes, scale):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, places):
        return ops.embedding(places, self.codes, self.scale, torch.bfloat16)


@over(chosen=[nullcontext(), ops.backend("reference")])
def test_operands_that_do_not_fit_are_refused(chosen):
    codes, scale = table()
    places = torch.randint(0, 50, (2, 3))
    with chosen:
        for bad, other in ((places.float(), codes), (places, codes.float()), (places, codes[None])):
            with pytest.raises(FP8OperandError, match=r"embedding: indices in .* expected int64 or int32, and \(rows"):
                ops.embedding(bad, other, scale, torch.float32)
        with pytest.raises(FP8ScaleError, match=r"of shape \(24,\) for a table .* expected \(1,\) or \(50, 1\)"):
            ops.embedding(places, codes, torch.ones(24), torch.float32)
        with pytest.raises(IndexError):
            ops.embedding(places + 50, codes, scale, torch.float32)
