"""The order of rows and the names that llama.cpp expects; writing the file itself needs the extra `benchmark`."""

from __future__ import annotations

import pytest
import torch
from hf.conftest import llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import gguf_model

HEADS, SIZE, POSITION = 3, 8, 5


def rotate_neighbours(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """llama.cpp's rotation: elements 2i and 2i + 1 of each head `[…, SIZE]` as a complex number, turned by angle i."""
    turned = torch.view_as_complex(states.reshape(*states.shape[:-1], -1, 2)) * torch.polar(
        torch.ones(SIZE // 2), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def test_pair_neighbours_rotates_alike():
    weight, x = torch.randn(HEADS * SIZE, 16), torch.randn(16)
    angles = POSITION * 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    half = (weight @ x).reshape(1, HEADS, 1, SIZE)
    both = torch.cat([angles, angles]).reshape(1, 1, SIZE)
    expected = apply_rotary_pos_emb(half, half, both.cos(), both.sin())[0].reshape(HEADS, SIZE)

    paired = gguf_model.pair_neighbours(weight, HEADS)
    found = rotate_neighbours((paired @ x).reshape(HEADS, SIZE), angles)
    assert not torch.equal(paired, weight)
    # Element i and element i + half of a head have become 2i and 2i + 1: the same numbers, hence the same products.
    assert torch.allclose(found.reshape(HEADS, -1, 2).transpose(1, 2).flatten(1), expected, atol=1e-5)


def test_every_parameter_has_a_name_of_its_own():
    names = [gguf_model.gguf_name(name) for name, _ in llama().named_parameters()]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output_norm.weight", "output.weight", "blk.1.attn_q.weight"} <= set(names)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.block_sparse_moe.gate.weight", "transformer.wte.weight"],
)
def test_other_models_are_refused(name):
    with pytest.raises(ValueError, match="expected a weight of LlamaForCausalLM"):
        gguf_model.gguf_name(name)
