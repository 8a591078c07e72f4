"""Stand-ins for vLLM's linear layers: their class names, attributes and forward passes, own code.

What they say to each other goes through functions of this file, as vLLM's goes through functions that the file of its
layers imports. `CALLS` has the shapes of what was added up, and put side by side.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

CALLS: list[tuple[str, tuple[int, ...]]] = []


class Coordinator:
    device_group = None


def get_tp_group():
    return Coordinator


def get_tensor_model_parallel_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def get_tensor_model_parallel_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def tensor_model_parallel_all_reduce(x):
    get_tp_group()
    CALLS.append(("all_reduce", tuple(x.shape)))
    x = x.clone()
    dist.all_reduce(x)
    return x


def tensor_model_parallel_all_gather(x, dim=-1):
    CALLS.append(("all_gather", tuple(x.shape)))
    parts = [torch.empty_like(x) for _ in range(get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


class UnquantizedLinearMethod:
    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)

    def embedding(self, layer, ids):
        return F.embedding(ids, layer.weight)


class LinearBase(nn.Module):
    """Takes the whole weight and bias, and keeps what of it is this process's."""

    def __init__(self, weight, bias=None, *, skip_bias_add=False, return_bias=True):
        super().__init__()
        self.quant_method = UnquantizedLinearMethod()
        self.skip_bias_add, self.return_bias = skip_bias_add, return_bias
        self.tp_rank, self.tp_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(self.part(weight).clone(), requires_grad=False)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(self.part_of_bias(bias).clone(), requires_grad=False)

    def part(self, weight):
        return weight

    def part_of_bias(self, bias):
        return self.part(bias)

    def results(self, output):
        if not self.return_bias:
            return output
        return output, self.bias if self.skip_bias_add else None


class ReplicatedLinear(LinearBase):
    def forward(self, x):
        return self.results(self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias))


class ColumnParallelLinear(LinearBase):
    output_sizes = None

    def __init__(self, weight, bias=None, *, gather_output=False, **options):
        super().__init__(weight, bias, **options)
        self.gather_output = gather_output

    def part(self, weight):
        layers = weight.split(self.output_sizes or [len(weight)])
        return torch.cat([layer.chunk(self.tp_size)[self.tp_rank] for layer in layers])

    def forward(self, input_):
        output = self.quant_method.apply(self, input_, None if self.skip_bias_add else self.bias)
        if self.gather_output and self.tp_size > 1:
            output = tensor_model_parallel_all_gather(output)
        return self.results(output)


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, weight, output_sizes, **options):
        self.output_sizes = output_sizes
        super().__init__(weight, **options)


class QKVParallelLinear(MergedColumnParallelLinear):
    pass


class RowParallelLinear(LinearBase):
    def __init__(self, weight, bias=None, *, input_is_parallel=True, reduce_results=True, **options):
        super().__init__(weight, bias, **options)
        self.input_is_parallel, self.reduce_results = input_is_parallel, reduce_results

    def part(self, weight):
        return weight.chunk(self.tp_size, dim=1)[self.tp_rank]

    def part_of_bias(self, bias):
        return bias

    def forward(self, input_):
        if not self.input_is_parallel:
            input_ = input_.chunk(self.tp_size, dim=-1)[self.tp_rank].contiguous()
        bias = None if self.tp_rank > 0 or self.skip_bias_add else self.bias
        output = self.quant_method.apply(self, input_, bias)
        if self.reduce_results and self.tp_size > 1:
            output = tensor_model_parallel_all_reduce(output)
        return self.results(output)


class HPURowParallelLinear(RowParallelLinear):
    """As vLLM for Gaudi derives from it."""


class VocabParallelEmbedding(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.tp_size = get_tensor_model_parallel_world_size()
        self.quant_method = UnquantizedLinearMethod()
        part = weight.chunk(self.tp_size)[get_tensor_model_parallel_rank()]
        self.weight = nn.Parameter(part.clone(), requires_grad=False)

    def forward(self, input_):
        return self.quant_method.embedding(self, input_)


class ParallelLMHead(VocabParallelEmbedding):
    def __init__(self, weight, bias=None):
        super().__init__(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input_):
        raise RuntimeError("LMHead's weights should be used in the sampler.")


class LogitsProcessor(nn.Module):
    """Calls the `quant_method` of a head."""

    def forward(self, lm_head, hidden_states, embedding_bias=None):
        return lm_head.quant_method.apply(lm_head, hidden_states, bias=embedding_bias)


class MLP(nn.Module):
    """Column, then row: what vLLM's models are made of. Every process makes the same whole weights."""

    def __init__(self, hidden=16, inner=32, bias=True, dtype=torch.float32, seed=0, **row):
        super().__init__()
        made = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=made).to(dtype)

        self.up = MergedColumnParallelLinear(draw(2 * inner, hidden), [inner, inner], bias=draw(2 * inner))
        self.down = RowParallelLinear(draw(hidden, inner), draw(hidden) if bias else None, **row)

    def forward(self, x):
        gate, up = self.up(x)[0].chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
