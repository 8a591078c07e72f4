"""A Llama in optimum-habana's manner: its helper modules and their interface, own code.

The decoder's attention derives from transformers' and calls `pre_attn_forward`; keys and values lie in static buffers
of its `KVCache` modules (`reuse_cache`), prompts are padded on the left, and a step writes at `token_idx - 1`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)


class Matmul(nn.Module):
    def forward(self, *args, **kwargs):
        return torch.matmul(*args, **kwargs)


class KVCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = None
        self.inp_seq_len = -1

    def allocate(self, inp_seq_len, dtype, device, shape):
        if self.cache is None or self.cache.shape != shape:
            self.cache = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.cache.fill_(0)
        self.inp_seq_len = inp_seq_len

    @staticmethod
    def update(prev, cur, dim, idx, inp_seq_len):
        if prev.shape == cur.shape:
            prev.copy_(cur)
            return cur
        if idx is not None and 1 < cur.shape[2] <= prev.shape[2]:  # the prompt
            prev[:, :, :inp_seq_len, :].copy_(cur)
            return cur
        if idx is not None:
            prev.index_copy_(dim, idx - 1, cur)
            return prev
        return torch.cat((prev, cur), dim=dim)

    def get_shape(self):
        return None if self.cache is None else self.cache.shape

    def forward(self, cur, dim, idx):
        return self.update(self.cache, cur, dim, idx, self.inp_seq_len)


class ModuleFusedSDPA(nn.Module):
    def __init__(self, fusedSDPA):
        super().__init__()
        self._hpu_kernel_fsdpa = fusedSDPA

    def forward(
        self,
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        softmax_mode,
        recompute_mode,
        valid_sequence_lengths,
        padding_side="left",
    ):
        return self._hpu_kernel_fsdpa.apply(
            *(query, key, value, attn_mask, dropout_p, is_causal, scale, softmax_mode, recompute_mode),
            *(valid_sequence_lengths, padding_side),
        )


class FusedSDPA:
    """Stands for the bridge's kernel, which torch's function overriding cannot look into."""

    @staticmethod
    def apply(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        softmax_mode="None",
        recompute=None,
        valid_seq_len=None,
        seq_padding_type="left",
    ):
        assert attn_mask is None or not is_causal
        if is_causal:
            places = torch.arange(key.shape[2])
            attn_mask = places[: query.shape[2], None] >= places
            if valid_seq_len is not None:
                first = key.shape[2] - valid_seq_len if seq_padding_type == "left" else torch.zeros_like(valid_seq_len)
                last = key.shape[2] if seq_padding_type == "left" else valid_seq_len.view(-1, 1, 1, 1)
                attn_mask = attn_mask & (places >= first.view(-1, 1, 1, 1)) & (places < last)
            attn_mask = additive(attn_mask).to(query.dtype)
        compute = torch.ops.aten._scaled_dot_product_attention_math
        return compute(query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=True)[0]


class GaudiLlamaAttention(LlamaAttention):
    def __init__(self, config, layer_idx, kernel):
        super().__init__(config, layer_idx)
        self.matmul_qk, self.matmul_av = Matmul(), Matmul()
        self.k_cache, self.v_cache = KVCache(), KVCache()
        self.fused_scaled_dot_product_attention = ModuleFusedSDPA(kernel)

    def allocate_kv_cache(self, batch_size, max_seq_len, inp_seq_len):
        shape = (batch_size, self.config.num_key_value_heads, max_seq_len, self.head_dim)
        for cache in (self.k_cache, self.v_cache):
            cache.allocate(inp_seq_len, self.q_proj.weight.dtype, self.q_proj.weight.device, torch.Size(shape))

    def reorder_kv_cache(self, beam_idx):
        for cache in (self.k_cache, self.v_cache):
            cache.cache.copy_(cache.cache.index_select(0, beam_idx))

    def pre_attn_forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask,
        token_idx,
        reuse_cache=True,
        use_flash_attention=False,
        flash_attention_recompute=False,
        flash_attention_causal_mask=False,
        valid_sequence_lengths=None,
    ):
        shape = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if reuse_cache:
            key, value = self.k_cache(key, 2, token_idx), self.v_cache(value, 2, token_idx)
        if not use_flash_attention:
            output = self._eager(query, key, value, attention_mask)
        elif shape[1] > 1 and flash_attention_causal_mask:
            output = self.fused_scaled_dot_product_attention(
                *(query, key, value, None, 0.0, True, None, "None", flash_attention_recompute),
                *(valid_sequence_lengths, "left"),
            )
        else:
            output = self.fused_scaled_dot_product_attention(
                *(query, key, value, attention_mask, 0.0, False, None, "None", False, None, "None")
            )
        return self.o_proj(output.transpose(1, 2).reshape(*shape, -1))

    def _eager(self, query, key, value, attention_mask):
        batch, heads, length, size = query.shape
        query = query.reshape(batch, key.shape[1], -1, length, size)
        key, value = (x.reshape(batch, x.shape[1], 1, *x.shape[2:]) for x in (key, value))
        scores = self.matmul_qk(query, key.transpose(-2, -1)) * self.scaling
        scores = scores + attention_mask[..., : key.shape[-2]].unsqueeze(1)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return self.matmul_av(weights, value).reshape(batch, heads, length, size)


class GaudiLlamaDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx, kernel):
        super().__init__()
        self.self_attn, self.mlp = GaudiLlamaAttention(config, layer_idx, kernel), LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, *args, **flags):
        hidden_states = hidden_states + self.self_attn.pre_attn_forward(
            self.input_layernorm(hidden_states), *args, **flags
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GaudiLlamaModel(nn.Module):
    def __init__(self, config, kernel):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(GaudiLlamaDecoderLayer(config, index, kernel) for index in layers)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, input_ids, attention_mask, position_ids, token_idx, **flags):
        x = self.embed_tokens(input_ids)
        position_embeddings = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(x, position_embeddings, attention_mask.to(x.dtype), token_idx, **flags)
        return self.norm(x)


class GaudiLlamaForCausalLM(PreTrainedModel):
    config_class = LlamaConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config, kernel=FusedSDPA):
        super().__init__(config)
        self.model = GaudiLlamaModel(config, kernel)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def allocate_kv_cache(self, batch_size, max_seq_len, inp_seq_len):
        for layer in self.model.layers:
            layer.self_attn.allocate_kv_cache(batch_size, max_seq_len, inp_seq_len)

    def forward(self, input_ids, attention_mask, position_ids, token_idx=None, **flags):
        return self.lm_head(self.model(input_ids, attention_mask, position_ids, token_idx, **flags))


def additive(seen):
    """A mask that is added to scores, of one that says what is seen."""
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)


@torch.no_grad()
def generate(model, input_ids, attention_mask, steps, forced=None, **flags):
    """Greedy decoding of prompts that are padded on the left, by prefill and steps over static buffers.

    Args:
        input_ids: `[batch, length]`.
        attention_mask: `[batch, length]`, 0 for padding.
        steps: tokens to generate.
        forced: `[batch, steps]`, tokens to go on with instead of those of the model.

    Returns:
        the tokens `[batch, steps]`, and the logits that each was taken from `[batch, steps, vocabulary]`.
    """
    batch, length = input_ids.shape
    model.allocate_kv_cache(batch, length + steps, length)
    lengths, places = attention_mask.sum(-1), torch.arange(length + steps)
    starts = (length - lengths)[:, None]
    valid = places >= starts
    causal = places[:length, None] >= places[:length]
    seen = causal & valid[:, None, :length]
    logits, tokens = [], []
    positions = (places[:length] - starts).clamp(min=0)
    found = model(
        input_ids, additive(seen[:, None]), positions, torch.tensor([length]), valid_sequence_lengths=lengths, **flags
    )
    for step in range(steps):
        logits.append(found[:, -1])
        chosen = found[:, -1].argmax(-1) if forced is None else forced[:, step]
        tokens.append(chosen)
        here = length + step
        seen = valid & (places <= here)
        position = here - starts
        found = model(chosen[:, None], additive(seen[:, None, None]), position, torch.tensor([here + 1]), **flags)
    return torch.stack(tokens, 1), torch.stack(logits, 1)
