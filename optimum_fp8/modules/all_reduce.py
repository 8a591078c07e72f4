"""What the processes say to each other that compute a layer together: sums of their results in high precision, or in
FP8, and their outputs side by side.

A sum in FP8 takes two exchanges, each of one byte a value: every process gets the codes of its share of all partial
results, adds up their values in float32, and hands out the codes of the sum. Codes go as bytes, which every library of
collective operations knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .. import ops
from ..errors import FP8NotAvailableError
from ..formats import NumberFormat

Collective = Callable[[torch.Tensor], torch.Tensor]
# torch's name for it is about to change.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Peers:
    """The processes that hold the parts of a layer, as one of them sees them.

    Attributes:
        count: how many there are.
        rank: which of them this is.
        group: their process group; None: all processes.
        reduce: the library's own sum over them, None: torch's.
        gather: the library's own way to put outputs side by side, None: torch's.
    """

    count: int = 1
    rank: int = 0
    group: Any = None
    reduce: Collective | None = None
    gather: Collective | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' `x`, in its dtype; `x` itself may be overwritten."""
        if self.count == 1:
            return x
        if self.reduce is not None:
            return self.reduce(x)
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The `x` of all processes side by side along the last dimension."""
        if self.count == 1:
            return x
        if self.gather is not None:
            return self.gather(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def all_reduce_in_fp8(
        self, x: torch.Tensor, partial_scale: torch.Tensor, sum_scale: torch.Tensor, fmt: NumberFormat, name: str = ""
    ) -> torch.Tensor:
        """The sum of all processes' `x`, each rounded to FP8 before it is sent, and the sum once more.

        Args:
            x: any shape, in high precision.
            partial_scale: float32 `(1,)`, the same in all processes.
            sum_scale: that of the sum, float32 `(1,)`, the same in all processes.
            fmt: the number format.
            name: of the layer, for messages.

        Returns:
            the sum, of the shape and in the dtype of `x`.

        Raises:
            FP8NotAvailableError: the process group that is known is another than the layer's.
        """
        if (found := dist.get_world_size(self.group)) != self.count:
            raise FP8NotAvailableError(
                f"{name}: the all-reduce in FP8 of {self.count} processes needs their process group, and found one of "
                f"{found}: set row_parallel_linear_allreduce_quantization=False"
            )
        share = -(-x.numel() // self.count)
        padded = torch.nn.functional.pad(x.reshape(-1), (0, share * self.count - x.numel()))
        sent = _bytes(ops.cast_to_fp8(padded, partial_scale, fmt.dtype, fmt.full_scale))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        partial = ops.cast_from_fp8(received.view(fmt.dtype), partial_scale, torch.float32)
        total = partial.reshape(self.count, share).sum(dim=0)
        _all_gather(received, _bytes(ops.cast_to_fp8(total, sum_scale, fmt.dtype, fmt.full_scale)), group=self.group)
        summed = ops.cast_from_fp8(received.view(fmt.dtype), sum_scale, x.dtype)
        return summed[: x.numel()].reshape(x.shape)


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes.contiguous().view(torch.uint8)
