"""A Llama in vLLM-Gaudi's manner: its helper modules, their interface and what runs around them, own code.

Keys and values lie in blocks of one cache a layer, which the runner allocates and hands over. A prompt is attended to
as a whole (`fsdpa_impl`, or `naive_impl` in parts); a step is computed block by block, over all blocks of all sequences
at once, which matrices of zeros and ones take apart and together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from optimum_habana_model import FusedSDPA, additive
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

BLOCK_SIZE = 16
PAD_BLOCK = 0  # what padding is written to, and what fills lists of blocks up; its content is no one's


class Matmul(nn.Module):
    def forward(self, x, y, **kwargs):
        return torch.matmul(x, y, **kwargs)


class B2BMatmul(Matmul):
    pass


class Softmax(nn.Module):
    def forward(self, x, dim=None, inv_head=None):
        return torch.softmax(x, dim)


class BlockSoftmaxConstMax(nn.Module):
    """Stands for a module around `block_softmax_const_max`: softmax over the blocks of each sequence."""

    def forward(self, attn, block_bias, block_groups, batch_size, global_max):
        exponentials = torch.exp((attn + block_bias).float() - global_max)
        sums = exponentials.sum(-1, keepdim=True)
        of_groups = torch.zeros(batch_size + 1, *sums.shape[1:]).index_add_(0, block_groups, sums)
        return (exponentials / (of_groups[block_groups] + torch.finfo(torch.float32).tiny)).to(attn.dtype)


class VLLMKVCache(nn.Module):
    def __init__(self, is_v_cache=False):
        super().__init__()
        self.use_contiguous_pa = False
        self.is_v_cache = is_v_cache

    def forward(self, input, cache, slot_mapping, scales=None, block_size=None, is_prompt=False, **kwargs):
        if input is not None:
            cache.index_copy_(0, slot_mapping, input)
        return cache

    def fetch_from_cache(self, cache, blocks, scales=None, **kwargs):
        if self.use_contiguous_pa:
            return cache[: blocks.size(0)]
        return cache.index_select(0, blocks)


class ModuleFusedSDPA(nn.Module):
    def __init__(self, fusedSDPA):
        super().__init__()
        self._hpu_kernel_fsdpa = fusedSDPA
        self._sliced_module = nn.Module()  # of long prompts, which are not sliced here

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
        window_size=None,
        sinks=None,
        context_len=None,
    ):
        if is_causal and attn_mask is not None:
            is_causal, valid_sequence_lengths = False, None
        return self._hpu_kernel_fsdpa.apply(
            *(query, key, value, attn_mask, dropout_p, is_causal, scale, softmax_mode, recompute_mode),
            *(valid_sequence_lengths, padding_side, False, False, window_size or (-1, -1), sinks),
        )


class WindowedFusedSDPA(FusedSDPA):
    """The bridge's kernel, with the arguments of newer releases."""

    @staticmethod
    def apply(*args):
        *old, dropout_mask, probabilities, window, sinks = args
        assert not dropout_mask and not probabilities and window == (-1, -1) and sinks is None
        return FusedSDPA.apply(*old)


@dataclass
class Metadata:
    """What the runner tells attention about a step."""

    is_prompt: bool
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor | None = None
    attn_bias: torch.Tensor | None = None
    block_list: torch.Tensor | None = None
    block_mapping: torch.Tensor | None = None
    block_groups: torch.Tensor | None = None


def batch2block(tensor, block_mapping, matmul):
    return matmul(block_mapping, tensor.reshape(tensor.shape[0], -1)).view(-1, *tensor.shape[1:])


def block2batch(tensor, block_mapping, matmul):
    return batch2block(tensor, block_mapping.t(), matmul)


class HPUAttentionImpl(nn.Module):
    def __init__(self, config, prefill, const_max, kernel):
        super().__init__()
        self.matmul_qk, self.softmax, self.matmul_av = Matmul(), Softmax(), Matmul()
        self.batch2block_matmul, self.block2batch_matmul = B2BMatmul(), B2BMatmul()
        self.k_cache, self.v_cache = VLLMKVCache(), VLLMKVCache(is_v_cache=True)
        self.fused_scaled_dot_product_attention = ModuleFusedSDPA(kernel)
        self.block_softmax = BlockSoftmaxConstMax() if const_max is not None else None
        self.scale, self.prefill, self.const_max = config.head_dim**-0.5, prefill, const_max

    def forward(self, query, key, value, kv_cache, metadata):
        """`[batch, length, heads, size]` each; the caches are `[slots, heads, size]`, and their scales may follow."""
        key_cache, value_cache, k_scales, v_scales = kv_cache
        slots = metadata.slot_mapping.flatten()
        key_cache = self.k_cache(key.flatten(0, 1), key_cache, slots, k_scales)
        value_cache = self.v_cache(value.flatten(0, 1), value_cache, slots, v_scales)
        if not metadata.is_prompt:
            return self._decode(query, key_cache, value_cache, metadata, k_scales, v_scales)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.prefill == "fsdpa_impl":
            output = self.fused_scaled_dot_product_attention(
                *(query, key, value, None, 0.0, True, self.scale, "fast", True, metadata.seq_lens, "right")
            )
        else:
            query, key, value = query.unflatten(1, (key.shape[1], -1)), key.unsqueeze(2), value.unsqueeze(2)
            scores = self.matmul_qk(query * self.scale, key.transpose(-1, -2))
            scores.add_(metadata.attn_bias.unsqueeze(2).to(scores.dtype))
            output = self.matmul_av(self.softmax(scores, dim=-1), value).flatten(1, 2)
        return output.transpose(1, 2)

    def _decode(self, query, key_cache, value_cache, metadata, k_scales, v_scales):
        batch, _, heads, size = query.shape
        mapping, blocks, groups = metadata.block_mapping.to(query.dtype), metadata.block_list, metadata.block_groups
        query = batch2block(self.scale * query.view(batch, -1), mapping, self.batch2block_matmul)
        key, value = (
            cache.fetch_from_cache(held.unflatten(0, (-1, BLOCK_SIZE)), blocks, scales=in_blocks(scales)).transpose(
                1, 2
            )
            for cache, held, scales in ((self.k_cache, key_cache, k_scales), (self.v_cache, value_cache, v_scales))
        )
        query = query.view(-1, key.shape[1], heads // key.shape[1], 1, size)
        key, value = key.unflatten(1, (key.shape[1], 1)).transpose(-2, -1), value.unflatten(1, (value.shape[1], 1))
        attn = self.matmul_qk(query, key, out=None)
        bias = metadata.attn_bias.view(-1, 1, 1, 1, BLOCK_SIZE).to(attn.dtype)
        if self.block_softmax is not None:
            attn = self.matmul_av(self.block_softmax(attn, bias, groups, batch, self.const_max), value)
        else:
            attn = self._over_blocks(attn.add_(bias), value, groups, batch)
        return block2batch(attn, mapping, self.block2batch_matmul).reshape(batch, 1, heads, size)

    def _over_blocks(self, attn, value, groups, batch):
        """The softmax of each block times its values, and that put right by what other blocks of its sequence have."""
        largest = attn.amax(-1, keepdim=True)
        attn = attn.sub(largest).exp()
        sums = attn.float().sum(-1, keepdim=True)
        attn, largest = self.matmul_av(attn, value), largest.float()
        of_group = torch.full((batch + 1, *largest.shape[1:]), -torch.inf).index_reduce_(0, groups, largest, "amax")
        adjustment = torch.exp(largest - of_group[groups])
        total = torch.zeros(batch + 1, *sums.shape[1:]).index_add_(0, groups, sums * adjustment)
        return attn.mul((adjustment / total[groups]).to(attn.dtype))


def in_blocks(scales):
    if isinstance(scales, tuple):
        return scales[0].unflatten(0, (-1, BLOCK_SIZE)), scales[1]
    return None if scales is None else scales.unflatten(0, (-1, BLOCK_SIZE))


class Attention(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.impl = HPUAttentionImpl(*args)

    def forward(self, *args):
        return self.impl(*args)


class LlamaAttention(nn.Module):
    def __init__(self, config, linear, *args):
        super().__init__()
        self.sizes = [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2
        self.head_dim = config.head_dim
        self.qkv_proj = linear(config.hidden_size, sum(self.sizes), bias=False)
        self.o_proj = linear(self.sizes[0], config.hidden_size, bias=False)
        self.attn = Attention(config, *args)

    def forward(self, x, rotary, kv_cache, metadata):
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(x).split(self.sizes, -1))
        query, key = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=2)
        return self.o_proj(self.attn(query, key, value, kv_cache, metadata).flatten(2))


class LlamaMLP(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.gate_up_proj = linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(nn.functional.silu(gate) * up)


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config, linear, *args):
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(config, linear, *args), LlamaMLP(config, linear)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, *args):
        x = x + self.self_attn(self.input_layernorm(x), *args)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, config, *args):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, *args) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, input_ids, positions, kv_caches, metadata):
        x = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(x, positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x = layer(x, rotary, kv_cache, metadata)
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    """The model as vLLM's, with its merged projections.

    Args:
        prefill: "fsdpa_impl" or "naive_impl".
        const_max: the constant that block softmax takes for the largest score; None: the largest is looked for.
        kernel: what stands for the bridge's fused attention.
        linear: the class of the projections.
    """

    def __init__(
        self,
        config: LlamaConfig,
        prefill: str = "fsdpa_impl",
        const_max: float | None = None,
        kernel: Any = WindowedFusedSDPA,
        linear: Any = nn.Linear,
    ):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, linear, prefill, const_max, kernel)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, *args):
        return self.lm_head(self.model(*args))

    def load_weights(self, weights):
        """The tensors of transformers' Llama, of which three, and two, become one."""
        merged = dict(weights)
        for index in range(self.config.num_hidden_layers):
            at = f"model.layers.{index}."
            for whole, parts in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
                names = [f"{at}{whole.split('.')[0]}.{part}_proj.weight" for part in parts]
                merged[f"{at}{whole}.weight"] = torch.cat([merged.pop(name) for name in names])
        self.load_state_dict(merged)
        return self


class Runner:
    """What vLLM does around the model: allocates caches, gives blocks to sequences, and says where they are.

    Args:
        model: a `LlamaForCausalLM`.
        blocks: how many there are.
        dtype: of the caches.
        scale_dtype: where the runner keeps scales of tokens, their dtype; None: it does not.
        garbage: what the block that belongs to no one is filled with.
    """

    def __init__(self, model, blocks=32, dtype=torch.bfloat16, scale_dtype=None, garbage=0.0):
        self.model, config = model, model.config
        shape = (blocks * BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self.kv_caches = [self._allocate(shape, blocks, dtype, scale_dtype, garbage) for _ in model.model.layers]
        self.free = list(range(PAD_BLOCK + 1, blocks))[::-1]  # not in the order of a batch

    @staticmethod
    def _allocate(shape, blocks, dtype, scale_dtype, garbage):
        caches = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
        for cache in caches:
            cache[:BLOCK_SIZE] = torch.tensor(garbage).to(dtype)
        if scale_dtype is None:
            return *caches, None, None
        k, v = (torch.zeros(*shape[:2], 1, dtype=scale_dtype) for _ in range(2))
        return *caches, k, (v, torch.zeros(blocks, *shape[1:], dtype=scale_dtype))

    @torch.no_grad()
    def generate(self, prompts, steps, forced=None, pad_blocks=1):
        """Greedy decoding of a batch; as `optimum_habana_model.generate`, of prompts without padding.

        Args:
            prompts: 1-D tensors.
            steps: tokens to generate.
            forced: `[batch, steps]`, tokens to go on with instead of those of the model.
            pad_blocks: how many blocks of no one each step gets besides.
        """
        lengths, tokens, logits = torch.tensor([len(prompt) for prompt in prompts]), [], []
        tables = [[] for _ in prompts]
        found = self._prefill(prompts, lengths, tables)
        for step in range(steps):
            logits.append(found)
            chosen = found.argmax(-1) if forced is None else forced[:, step]
            tokens.append(chosen)
            found = self._step(chosen, lengths + step, tables, pad_blocks)
        self.free += [block for table in tables for block in table]
        return torch.stack(tokens, 1), torch.stack(logits, 1)

    def _slot(self, table, position):
        while len(table) * BLOCK_SIZE <= position:
            table.append(self.free.pop())
        return table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def _prefill(self, prompts, lengths, tables):
        ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        length = ids.shape[1]
        slots = [
            [self._slot(table, i) if i < len(prompt) else PAD_BLOCK * BLOCK_SIZE for i in range(length)]
            for prompt, table in zip(prompts, tables, strict=True)
        ]
        places = torch.arange(length)
        seen = (places[:, None] >= places) & (places < lengths[:, None, None])
        metadata = Metadata(True, torch.tensor(slots), lengths, additive(seen[:, None]))
        found = self.model(ids, places.expand_as(ids), self.kv_caches, metadata)
        return found[torch.arange(len(prompts)), lengths - 1]

    def _step(self, chosen, positions, tables, pad_blocks):
        slots = torch.tensor([[self._slot(table, int(at))] for table, at in zip(tables, positions, strict=True)])
        batch = len(tables)
        owners = [row for row, table in enumerate(tables) for _ in table] + [batch] * pad_blocks
        blocks = torch.tensor([block for table in tables for block in table] + [PAD_BLOCK] * pad_blocks)
        groups = torch.tensor(owners)
        first = torch.tensor([i * BLOCK_SIZE for table in tables for i in range(len(table))] + [0] * pad_blocks)
        last = torch.cat([positions, torch.tensor([-1])])[groups]
        seen = first[:, None] + torch.arange(BLOCK_SIZE) <= last[:, None]
        mapping = groups[:, None] == torch.arange(batch)
        metadata = Metadata(False, slots, None, additive(seen), blocks, mapping, groups)
        return self.model(chosen[:, None], positions[:, None], self.kv_caches, metadata)[:, -1]
