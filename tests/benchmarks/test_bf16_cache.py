"""Our attention over a bfloat16 cache computes what float64 does, and tells why it cannot be compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import attention, bf16_cache
from optimum_fp8 import ops


@pytest.fixture
def compiled_anew():
    bf16_cache.load.cache_clear()
    yield
    bf16_cache.load.cache_clear()


@pytest.mark.parametrize(
    "heads, tokens",
    [
        (attention.Heads(4, 2), 300),
        (attention.Heads(5, 5, 72), 64),
        (attention.Heads(8, 1, 40), 129),
        (attention.Heads(3, 1, 17), 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_is_that_of_float64(heads, tokens, dtype):
    query = torch.randn(1, heads.queries, 1, heads.size).to(dtype)
    key, value = (torch.randn(1, tokens, heads.keys, heads.size).bfloat16().transpose(1, 2) for _ in range(2))
    expected = attention.exact(query, key, value)
    found = bf16_cache.attention(query, key, value)
    assert found.shape == expected.shape and found.dtype == dtype
    most = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=most, atol=most * float(expected.abs().max()))


@pytest.mark.parametrize(
    "compiler, told",
    [("no_such_cc", "no C compiler 'no_such_cc'"), ("false", "false ended with status 1"), ("cc -fwhat", "fwhat")],
)
def test_a_compiler_that_fails_is_told(monkeypatch, compiler, told):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(RuntimeError, match=told):
        bf16_cache._compile("portable", Path("unused.so"))


def test_without_kernels_of_ours_there_is_none_to_compare(monkeypatch, compiled_anew):
    monkeypatch.setattr(ops.cpu, "backends", lambda: [])
    monkeypatch.setattr(ops, "missing", lambda name: f"{name} was not built")
    with pytest.raises(RuntimeError, match="cpu was not built"):
        bf16_cache.load()
