"""The model of the comparisons: a Llama of half a billion parameters with random weights, on disk once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(tempfile.gettempdir()) / "optimum_fp8_benchmarks"
HALF_BILLION: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
# The same number of operations on next to no data: what is left is the time of the code around the arithmetic.
WEIGHTLESS: dict[str, Any] = {**HALF_BILLION, "hidden_size": 128, "intermediate_size": 128, "vocab_size": 128}

SCALES_PER_CHANNEL = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
SCALES_PER_TENSOR = "maxabs_pow2"


def llama(folder: Path = FOLDER, name: str = "llama-0.5b", **overrides: Any) -> Path:
    """The folder of a random Llama in bfloat16, which is made if it is not there yet.

    It ends no text by itself (it has no end token), so that every run decodes as many tokens as it is asked for.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / name
    if not (path / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            **{**HALF_BILLION, **overrides},
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def weight_bytes(folder: Path) -> int:
    """Bytes of all tensors on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load(folder: Path, scale_method: str | None = None, kv_cache: bool = False) -> Any:
    """The model in bfloat16, or (with a scale method) weight-only in FP8 with its output head (and cache)."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if scale_method is not None:
        from optimum_fp8 import FP8Config

        options["quantization_config"] = FP8Config(
            activation_scheme="weight_only", quantize_lm_head=True, scale_method=scale_method, kv_cache=kv_cache
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def in_fp8(folder: Path, scale_method: str) -> Path:
    """The folder of the same model as an FP8 checkpoint, which is made if it is not there yet."""
    path = folder.with_name(f"{folder.name}-{scale_method}")
    if not (path / "config.json").exists():
        load(folder, scale_method).save_pretrained(path)
    return path


def load_int8(folder: Path) -> Any:
    """torch's own int8: linear layers in int8 with dynamic activations, the rest in float32."""
    import warnings

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its end, release after release
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


def prompt(batch: int, length: int, vocabulary: int = HALF_BILLION["vocab_size"]) -> torch.Tensor:
    """Random tokens `[batch, length]`, the same ones every time."""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))
