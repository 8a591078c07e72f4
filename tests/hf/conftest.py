"""Tiny random models on disk: structure without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 128


def llama(tied: bool = False, **overrides) -> LlamaForCausalLM:
    options = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
    }
    return LlamaForCausalLM(LlamaConfig(**options | overrides)).eval()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Write a model (bfloat16 unless told otherwise) and return its folder."""

    def write(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16, name: str = "model", **options) -> str:
        model.to(dtype).save_pretrained(tmp_path / name, **options)
        return str(tmp_path / name)

    return write


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, VOCABULARY, (2, 16), generator=generator)} for _ in range(4)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: enough to feed text to the tiny models."""
    vocabulary = {chr(code): code for code in range(VOCABULARY)}
    tokens = Tokenizer(models.BPE(vocabulary, [], unk_token=chr(0)))
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token=chr(0), pad_token=chr(1), eos_token=chr(2))
