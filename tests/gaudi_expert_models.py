"""Small models with experts in the manner of optimum-habana and of vLLM's plugin for Gaudi: their interface, own code.

Both compute the mixture by Gaudi's operator, so they run where that is, or is emulated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig, PreTrainedModel

CONFIG = MixtralConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    vocab_size=64,
)
IDS = torch.arange(2 * 24).reshape(2, 24) * 5 % 61


def routes(logits: torch.Tensor, top: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weights, table = torch.topk(F.softmax(logits, dim=1, dtype=torch.float32), top, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(dtype), table


# --- optimum-habana ---------------------------------------------------------------------------------------------------


class MixtralBlockSparseTop2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GaudiMixtralSparseMoeBlock(nn.Module):
    def __init__(self, config, experts_min=0, experts_max=None):
        super().__init__()
        self.num_experts, self.top_k, self.ep_size = config.num_local_experts, config.num_experts_per_tok, 1
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts_min, self.experts_max = experts_min, experts_max or self.num_experts - 1
        self.experts_range = range(self.experts_min, self.experts_max + 1)
        here = (MixtralBlockSparseTop2MLP(config) if i in self.experts_range else None for i in range(self.num_experts))
        self.experts = nn.ModuleList(here)

    def forward(self, hidden_states):
        shape = hidden_states.shape
        hidden_states = hidden_states.view(-1, shape[-1])
        logits = self.gate(hidden_states)
        weights, table = routes(logits, self.top_k, hidden_states.dtype)
        out = self.call_dynamic_moe_op(hidden_states=hidden_states, expert_routing_table=table, router_weights=weights)
        return out.view(shape), logits

    def call_dynamic_moe_op(self, hidden_states, expert_routing_table, router_weights):
        lists = [[getattr(self.experts[i], name).weight for i in self.experts_range] for name in ("w1", "w2", "w3")]
        return torch.ops.hpu.mixture_of_experts(
            hidden_states=hidden_states,
            expert_routing_table=expert_routing_table,
            router_weights=router_weights,
            w1=lists[0],
            w2=lists[2],
            w3=lists[1],
            permuted_weights=True,
            activation="silu",
            experts_min=self.experts_min,
            experts_max=self.experts_max,
        )


class GaudiDeepseekV3MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GaudiDeepseekV3MoE(nn.Module):
    """It calls for its experts some at a time, and has one that all tokens go to."""

    at_a_time = 3

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.top_k = config.num_local_experts, config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(GaudiDeepseekV3MLP(config) for _ in range(self.num_experts))
        self.shared_experts = GaudiDeepseekV3MLP(config)

    def forward(self, hidden_states):
        shape = hidden_states.shape
        x = hidden_states.view(-1, shape[-1])
        weights, table = routes(self.gate(x), self.top_k, x.dtype)
        out = torch.zeros_like(x)
        for start in range(0, self.num_experts, self.at_a_time):
            stop = min(start + self.at_a_time, self.num_experts)
            out = out + self.call_dynamic_moe_op(x, table, weights, start, stop)
        return out.view(shape) + self.shared_experts(hidden_states), None

    def call_dynamic_moe_op(self, hidden_states, topk_idx, topk_weight, experts_min, experts_max):
        names = ("gate_proj", "up_proj", "down_proj")
        asked = range(experts_min, experts_max)
        lists = [[getattr(self.experts[i], name).weight.squeeze() for i in asked] for name in names]
        args = (hidden_states.to(torch.bfloat16), topk_idx, topk_weight, *lists)
        return torch.ops.hpu.mixture_of_experts(*args, True, "silu", experts_min, experts_max - 1)


# --- vLLM -------------------------------------------------------------------------------------------------------------


class MoeMatmul(nn.Module):
    def set_weight(self, w):
        self.weight = w

    def forward(self, *args):
        raise NotImplementedError


class MoeFP8Matmul(MoeMatmul):
    def set_scale_inv_fp8(self, scale):
        self.scale_inv_fp8 = scale

    def get_dequant_weight(self):
        return (self.weight.float() * self.scale_inv_fp8).to(torch.bfloat16)


class VllmMixtureOfExpertsOp(nn.Module):
    matrix = MoeMatmul

    def __init__(self, global_num_experts, num_experts, experts_min=0, experts_max=8, bias=None, dispatch_fn=None):
        super().__init__()
        self.global_num_experts, self.num_experts, self.bias = global_num_experts, num_experts, bias
        self.experts_min, self.experts_max, self.dispatch_func = experts_min, experts_max, dispatch_fn
        self.w13_list = nn.ModuleList(self.matrix() for _ in range(num_experts))
        self.w2_list = nn.ModuleList(self.matrix() for _ in range(num_experts))

    def weights(self):
        return [[matrix.weight for matrix in each] for each in (self.w13_list, self.w2_list)]

    def forward(self, hidden_states, expert_routing_table, router_weights, permuted_weights=True, activation="silu"):
        return torch.ops.hpu.mixture_of_experts(
            hidden_states=hidden_states,
            expert_routing_table=expert_routing_table,
            router_weights=router_weights,
            w12=self.weights()[0],
            w3=self.weights()[1],
            permuted_weights=permuted_weights,
            activation=activation,
            experts_min=self.experts_min,
            experts_max=self.experts_max,
        )


class VllmMixtureOfExpertsOpFP8PerChannel(VllmMixtureOfExpertsOp):
    matrix = MoeFP8Matmul

    def weights(self):
        return [[matrix.get_dequant_weight() for matrix in each] for each in (self.w13_list, self.w2_list)]

    def forward(self, x, topk_ids, topk_weights, permuted_weights=True, activation="silu"):
        return super().forward(x, topk_ids, topk_weights, permuted_weights, activation)


class FusedMoE(nn.Module):
    """The layer around the operation: it has the weights of all experts as two stacks."""

    operation = VllmMixtureOfExpertsOp

    def __init__(self, config, first=0, count=None):
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        count = count or experts
        self.top_k, self.activation = config.num_experts_per_tok, "silu"
        self.w13_weight = nn.Parameter(torch.empty(count, 2 * inner, hidden), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.empty(count, hidden, inner), requires_grad=False)
        self.moe_op = self.operation(experts, count, first, first + count - 1)
        self.hand_out()

    def hand_out(self):
        for i in range(len(self.w13_weight)):
            self.moe_op.w13_list[i].set_weight(self.w13_weight.data[i])
            self.moe_op.w2_list[i].set_weight(self.w2_weight.data[i])

    def forward(self, x, logits):
        weights, table = routes(logits, self.top_k, x.dtype)
        return self.moe_op(x, table, weights, permuted_weights=True, activation=self.activation)


class VllmBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = FusedMoE(config)

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(x)
        return self.experts(x, logits).view(hidden_states.shape), logits


# --- models -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, config, block):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.hidden_size)
        self.block_sparse_moe = block(config)

    def forward(self, x):
        x = x + self.mixer(x.roll(1, dims=1))
        return x + self.block_sparse_moe(self.norm(x))[0]


class GaudiMixtral(PreTrainedModel):
    """A language model whose attention looks at the token before alone."""

    config_class = MixtralConfig
    block = GaudiMixtralSparseMoeBlock

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, self.block) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class GaudiDeepseek(GaudiMixtral):
    block = GaudiDeepseekV3MoE


class VllmMixtral(nn.Module):
    """In vLLM's manner; it is no model of transformers."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, VllmBlock) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def expert_model(model_class: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """Random, with weights large enough that each expert matters."""
    torch.manual_seed(3)
    config = copy.deepcopy(CONFIG)
    config.update(options)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    model.to(dtype)
    for module in model.modules():
        if hasattr(module, "hand_out"):
            module.hand_out()
    return model
