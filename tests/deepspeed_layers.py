"""Stand-ins for the linear layers of DeepSpeed's tensor parallelism: their names, attributes and forward, own code."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed
from torch import nn

CALLS: list[tuple[int, ...]] = []


def _inference_all_reduce(tensor, op=None, group=None):
    CALLS.append(tuple(tensor.shape))
    torch.distributed.all_reduce(tensor, group=group)


dist = SimpleNamespace(inference_all_reduce=_inference_all_reduce)


def get_shard_size_list(total_size, mp_size, name=None):
    return [total_size // mp_size + (1 if rank < total_size % mp_size else 0) for rank in range(mp_size)]


class TensorParallel_Layer(nn.Module):
    def __init__(self, module, mp_group):
        super().__init__()
        self.mp_group = mp_group
        self.tp_world_size = torch.distributed.get_world_size(mp_group) if mp_group is not None else 1
        self.tp_index = torch.distributed.get_rank(mp_group) if mp_group is not None else 0
        self.world_size, self.rank, self.name = self.tp_world_size, self.tp_index, "of DeepSpeed"
        self.weight, self.bias = module.weight, module.bias
        self.split()

    def split_by(self, parameter, dim):
        sizes = get_shard_size_list(parameter.shape[dim], self.tp_world_size, self.name)
        parameter.data = parameter.data.split(sizes, dim=dim)[self.tp_index].clone()


class LinearLayer(TensorParallel_Layer):
    def split(self):
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                self.split_by(parameter, 0)

    def forward(self, input):
        output = torch.matmul(input, self.weight.transpose(-1, -2))
        if self.bias is not None:
            output += self.bias
        return output


class LinearAllreduce(TensorParallel_Layer):
    def split(self):
        self.split_by(self.weight, 1)

    def forward(self, input):
        output = torch.matmul(input, self.weight.transpose(-1, -2))
        if self.mp_group is not None:
            dist.inference_all_reduce(output, group=self.mp_group)
        if self.bias is not None:
            output += self.bias
        return output


class LmHeadLinearAllreduce(LinearAllreduce):
    def forward(self, input):
        sizes = get_shard_size_list(input.shape[-1], self.tp_world_size, "lm_head")
        start = sum(sizes[: self.tp_index])
        output = torch.matmul(input[:, :, start : start + sizes[self.tp_index]], self.weight.transpose(-1, -2))
        if self.mp_group is not None:
            dist.inference_all_reduce(output, group=self.mp_group)
        if self.bias is not None:
            output += self.bias
        return output


class ScopedLinearAllReduce(nn.Module):
    """optimum-habana makes it of a LinearAllreduce, and calls its three parts one after the other."""

    def __init__(self, mod):
        super().__init__()
        self.__dict__.update(mod.__dict__)

    def forward(self, input):
        return torch.matmul(input, self.weight.transpose(-1, -2))

    def all_reduce(self, input):
        if self.mp_group is not None:
            dist.inference_all_reduce(input, group=self.mp_group)

    def post_all_reduce(self, input):
        return input + self.bias if self.bias is not None else input


class Block(nn.Module):
    """Layers of each kind; every process makes the same whole weights."""

    def __init__(self, mp_group=None, hidden=16, inner=26, vocabulary=12, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up = LinearLayer(nn.Linear(hidden, inner), mp_group)
        self.down = LinearAllreduce(nn.Linear(inner, hidden), mp_group)
        self.scoped_up = LinearLayer(nn.Linear(hidden, inner, bias=False), mp_group)
        self.scoped = ScopedLinearAllReduce(LinearAllreduce(nn.Linear(inner, hidden), mp_group))
        self.head = LmHeadLinearAllreduce(nn.Linear(hidden, vocabulary, bias=False), mp_group)
        self.requires_grad_(False)

    def forward(self, x):
        x = x + self.down(self.up(x).relu())
        y = self.scoped(self.scoped_up(x).relu())
        self.scoped.all_reduce(y)
        return self.head(x + self.scoped.post_all_reduce(y))
