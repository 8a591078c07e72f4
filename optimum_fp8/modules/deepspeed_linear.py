"""DeepSpeed's linear layers in FP8, that its automatic tensor parallelism puts into a model."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .all_reduce import Peers
from .handler import register_handler
from .linear import FP8LinearBase
from .parallel import FP8RowParallel, ParallelHandler, RowParallelHandler, imported


def deepspeed_peers(module: Any) -> Peers:
    """The processes that hold the parts of a layer of DeepSpeed's."""
    group = getattr(module, "mp_group", None)
    if group is None:
        return Peers()
    count = next((n for name in ("tp_world_size", "world_size") if (n := getattr(module, name, None))), None)
    rank = next((n for name in ("tp_index", "rank") if (n := getattr(module, name, None)) is not None), None)
    reduce = getattr(imported(module, "dist"), "inference_all_reduce", None)
    return Peers(
        dist.get_world_size(group) if count is None else count,
        dist.get_rank(group) if rank is None else rank,
        group,
        None if reduce is None else partial(_reduced_in_place, reduce, group),
    )


def _reduced_in_place(reduce: Any, group: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    reduce(x, group=group)
    return x


def _lacking(module: Any) -> str | None:
    """Why a module of one of these names is not DeepSpeed's, or None: older versions of `LinearLayer` have no group."""
    if hasattr(module, "mp_group") or type(module).__module__.split(".")[0] == "deepspeed":
        return None
    return "it has no mp_group, as DeepSpeed's layers do"


class _SharesGroup(FP8LinearBase):
    """A layer whose copies speak over the same process group, which cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        group = getattr(self, "mp_group", None)
        memo[id(group)] = group
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made


class FP8LinearLayer(_SharesGroup):
    """A layer split by columns, with an FP8 weight `[out / processes, in]`."""


class FP8ScopedLinearAllReduce(_SharesGroup):
    """A layer split by rows, of which only the product is its forward pass: whoever calls it goes on with its
    `all_reduce`, and its `post_all_reduce`, which adds the bias."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.product(input, None)


class FP8LinearAllreduce(FP8RowParallel, _SharesGroup):
    """A layer split by rows, with an FP8 weight `[out, in / processes]`."""

    @staticmethod
    def peers(module: Any) -> Peers:
        return deepspeed_peers(module)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.computed(input)  # type: ignore[no-any-return]


class FP8LmHeadLinearAllreduce(FP8LinearAllreduce):
    """The output head: it is given the whole input, and takes its part of it."""

    may_sum_in_fp8 = False

    @staticmethod
    def own_part(module: Any, x: torch.Tensor) -> torch.Tensor:
        peers, width = deepspeed_peers(module), x.shape[-1]
        sizes = getattr(module, "_partition_sizes", None)
        if sizes is None and (split := imported(module, "get_shard_size_list")):
            sizes = split(width, peers.count, "lm_head")
        if sizes is None:
            sizes = [width // peers.count + (rank < width % peers.count) for rank in range(peers.count)]
        return x[..., sum(sizes[: peers.rank]) :][..., : sizes[peers.rank]]


for _handler in (
    ParallelHandler("DeepSpeed columns", ("LinearLayer",), FP8LinearLayer, deepspeed_peers, _lacking),
    ParallelHandler(
        "DeepSpeed scoped rows", ("ScopedLinearAllReduce",), FP8ScopedLinearAllReduce, deepspeed_peers, _lacking
    ),
    RowParallelHandler("DeepSpeed rows", ("LinearAllreduce",), FP8LinearAllreduce, deepspeed_peers, _lacking),
    RowParallelHandler(
        "DeepSpeed head", ("LmHeadLinearAllreduce",), FP8LmHeadLinearAllreduce, deepspeed_peers, _lacking
    ),
):
    register_handler(_handler)
