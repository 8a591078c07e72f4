"""A Llama of transformers as llama.cpp reads it: one GGUF file with its matrices in Q8_0.

Only the `gguf` package is needed, and only to write. The file has no vocabulary, since tokens go in and out as numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter: "model.layers.3.mlp.up_proj.weight" is "blk.3.ffn_up.weight".

    Raises:
        ValueError: the parameter is not one of a plain Llama.
    """
    module, _, parameter = name.rpartition(".")
    if module in _OUTER and parameter == "weight":
        return f"{_OUTER[module]}.weight"
    parts = module.removeprefix("model.layers.").split(".", 1)
    if len(parts) != 2 or not parts[0].isdigit() or parts[1] not in _INNER or parameter != "weight":
        raise ValueError(f"{name!r} has no place in llama.cpp's Llama: expected a weight of LlamaForCausalLM")
    return f"blk.{parts[0]}.{_INNER[parts[1]]}.weight"


def pair_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection in the order that llama.cpp rotates them in.

    transformers rotates element i of a head together with element i + half, llama.cpp elements 2i and 2i + 1.
    """
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def convert(folder: Path, path: Path) -> Path:
    """Write the checkpoint in `folder` to `path`: matrices (embeddings and head too) in Q8_0, norms in float32."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama")
    _write_header(writer, config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                weight, projection = tensors.get_tensor(name).float(), name.split(".")[-2]
                if projection in heads:
                    weight = pair_neighbours(weight, heads[projection])
                matrix, kind = np.ascontiguousarray(weight.numpy()), gguf.GGMLQuantizationType.Q8_0
                if weight.ndim == 1:
                    writer.add_tensor(gguf_name(name), matrix)
                else:
                    writer.add_tensor(gguf_name(name), gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_header(writer: Any, config: Any) -> None:
    import gguf

    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("none")
