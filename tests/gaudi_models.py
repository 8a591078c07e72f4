"""A small language model written around helper modules, as model files for Gaudi are: their interface, own code.

Its decoder layers call `pre_attn_forward` of the attention, whose class derives from one of transformers'; keys and
values are stored by the `KVCache` modules themselves (`reuse_cache`), or by whoever calls the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=128,
)


class Matmul(nn.Module):
    def forward(self, x, y):
        return torch.matmul(x, y)


class Softmax(nn.Module):
    def forward(self, x, dim=None, invAttnHead=None):
        return torch.softmax(x, dim)


class FusedSDPA:
    """Stands for a kernel that torch's function overriding cannot look into."""

    @staticmethod
    def apply(query, key, value, attn_mask, dropout_p, is_causal, scale, *rest):
        compute = torch.ops.aten._scaled_dot_product_attention_math
        return compute(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)[0]


class ModuleFusedSDPA(nn.Module):
    def __init__(self, fusedSDPA):
        super().__init__()
        self._hpu_kernel_fsdpa = fusedSDPA

    def forward(self, query, key, value, attn_mask, dropout_p, is_causal, scale, softmax_mode, recompute_mode, lengths):
        rest = (attn_mask, dropout_p, is_causal, scale, softmax_mode, recompute_mode, lengths)
        return self._hpu_kernel_fsdpa.apply(query, key, value, *rest)


class KVCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = None
        self.inp_seq_len = -1

    def allocate(self, inp_seq_len, dtype, device, shape):
        if self.cache is None or self.cache.shape != shape:
            self.inp_seq_len = inp_seq_len
            self.cache = torch.zeros(shape, dtype=dtype, device=device)
        else:
            assert self.inp_seq_len == inp_seq_len
            self.cache.fill_(0)

    @staticmethod
    def update(prev, cur, dim, idx, inp_seq_len):
        if prev.shape == cur.shape:
            prev.copy_(cur)
            return cur
        if idx is not None and 1 < cur.shape[2] <= prev.shape[2]:
            prev[:, :, :inp_seq_len, :].copy_(cur)
            return cur
        if idx is not None:
            return prev.index_copy_(dim, idx - 1, cur)
        return torch.cat((prev, cur), dim=dim)

    def get_shape(self):
        return None if self.cache is None else self.cache.shape

    def forward(self, cur, dim, idx):
        return self.update(self.cache, cur, dim, idx, self.inp_seq_len)


class GaudiAttention(LlamaAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.matmul_qk, self.matmul_av, self.softmax = Matmul(), Matmul(), Softmax()
        self.k_cache, self.v_cache = KVCache(), KVCache()
        self.fused_scaled_dot_product_attention = ModuleFusedSDPA(FusedSDPA)

    def allocate_kv_cache(self, batch, max_length, prompt, dtype):
        shape = torch.Size((batch, self.config.num_key_value_heads, max_length, self.head_dim))
        for cache in (self.k_cache, self.v_cache):
            cache.allocate(prompt, dtype, "cpu", shape)

    def reorder_kv_cache(self, beams):
        for cache in (self.k_cache, self.v_cache):
            cache.cache.copy_(cache.cache.index_select(0, beams))

    def pre_attn_forward(self, x, mask, past, token_idx, flash):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past is None:  # the cache modules keep what they are given
            k, v = self.k_cache(k, 2, token_idx), self.v_cache(v, 2, token_idx)
        elif past:
            k, v = self.k_cache.update(past[0], k, 2, token_idx, -1), self.v_cache.update(past[1], v, 2, token_idx, -1)
        mask = mask[..., : k.shape[2]]
        if flash:
            whole = self.fused_scaled_dot_product_attention
            out = whole(q, k, v, mask, 0.0, False, self.scaling, "None", False, None)
        else:
            groups = (x.shape[0], k.shape[1], -1, x.shape[1], self.head_dim)
            q, keys, values = q.reshape(groups), k.unsqueeze(2), v.unsqueeze(2)
            scores = self.matmul_qk(q, keys.transpose(-2, -1)) * self.scaling + mask.unsqueeze(1)
            out = self.matmul_av(self.softmax(scores, dim=-1), values).flatten(1, 2)
        return self.o_proj(out.transpose(1, 2).flatten(-2)), (k, v)


class GaudiLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn, self.mlp = GaudiAttention(config, layer_idx), LlamaMLP(config)
        self.norm, self.mlp_norm = LlamaRMSNorm(config.hidden_size), LlamaRMSNorm(config.hidden_size)

    def forward(self, x, *args):
        out, kept = self.self_attn.pre_attn_forward(self.norm(x), *args)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), kept


class GaudiForCausalLM(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GaudiLayer(config, index) for index in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, past_key_values=(), token_idx=None, flash=False, **kwargs):
        """`past_key_values`: (): use no cache; None: the cache modules'; else what the last call returned."""
        length, start = input_ids.shape[1], 0
        x = self.embed_tokens(input_ids)
        if past_key_values is None:
            start = 0 if length > 1 else int(token_idx) - 1
            longest = self.layers[0].self_attn.k_cache.cache.shape[2]
        else:
            start = past_key_values[0][0].shape[2] if past_key_values and length == 1 else 0
            longest = start + length
        mask = torch.full((length, longest), float("-inf"), dtype=x.dtype).triu(1 + start)[None, None]
        kept = []
        for index, layer in enumerate(self.layers):
            past = past_key_values[index] if past_key_values else past_key_values
            x, each = layer(x, mask, past, token_idx, flash)
            kept.append(each)
        return self.lm_head(x), kept


def gaudi_model() -> GaudiForCausalLM:
    """Random, with weights large enough that what is attended to matters."""
    torch.manual_seed(3)
    model = GaudiForCausalLM(copy.deepcopy(CONFIG)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def generate(model: Any, ids: torch.Tensor, steps: int, reuse_cache: bool = True, **options: Any) -> torch.Tensor:
    """Logits of the prompt and of tokens decoded one by one, over a cache: `[batch, length + steps, vocabulary]`."""
    length, tokens = ids.shape[1], torch.arange(steps) % 60 + 3
    if reuse_cache:
        for layer in model.layers:
            layer.self_attn.allocate_kv_cache(ids.shape[0], length + steps, length, model.dtype)
    else:
        shape = (ids.shape[0], CONFIG.num_key_value_heads, length, CONFIG.hidden_size // CONFIG.num_attention_heads)
        past = [(torch.zeros(shape, dtype=model.dtype), torch.zeros(shape, dtype=model.dtype)) for _ in model.layers]
    logits = []
    for step, new in enumerate([ids, *tokens.view(-1, 1, 1).expand(-1, ids.shape[0], 1)]):
        token_idx = torch.tensor([length + step]) if reuse_cache else None
        found, kept = model(new, None if reuse_cache else past, token_idx, **options)
        logits.append(found)
        past = kept
    return torch.cat(logits, dim=1)
