"""Memory while loading: the high-precision model is never whole in anonymous memory."""

from __future__ import annotations

import json

import fresh
import pytest
import torch
from anonymous_memory import WATCHED
from hf.conftest import llama
from transformers import MixtralConfig, MixtralForCausalLM

MIB = 2**20

# Loads in a process of its own; a thread samples RssAnon, because file-backed pages of the checkpoint do not count.
SCRIPT = (
    WATCHED
    + """
import json, sys
import torch, optimum_fp8
from transformers import AutoModelForCausalLM
from optimum_fp8 import FP8Config

def load(folder, method):
    config = FP8Config(scale_method=method)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)

load(sys.argv[2], sys.argv[3])  # imports and pools are there before the measurement starts
with Watched() as memory:
    model = load(sys.argv[1], sys.argv[3])
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": memory.peak - memory.before, "model": size}))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["maxabs_hw", "maxabs_pcs_pow2"])
def test_peak_while_quantizing(save, method):
    big = llama(hidden_size=1024, intermediate_size=3072, num_hidden_layers=7, num_attention_heads=8)
    largest = 4 * max(parameter.numel() for parameter in big.parameters())
    assert sum(parameter.numel() for parameter in big.parameters()) * 4 >= 300e6
    folder, small = save(big, torch.float32), save(llama(), torch.float32, name="small")
    del big
    found = json.loads(fresh.TRANSFORMERS.run(SCRIPT, folder, small, method))
    limit = found["model"] + largest + 100 * MIB
    assert found["peak"] <= limit, f"peak {found['peak'] / MIB:.0f} MiB, limit {limit / MIB:.0f} MiB"
    print(f"peak {found['peak'] / MIB:.0f} MiB, FP8 model {found['model'] / MIB:.0f} MiB, limit {limit / MIB:.0f} MiB")


def mixture(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 4, "vocab_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes | more | options))


@pytest.mark.slow
def test_peak_while_quantizing_experts(save):
    """One stack at a time is in high precision, and the weights that it is made of."""
    big = mixture(hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    stack = 2 * max(parameter.numel() for parameter in big.parameters())
    whole = 2 * sum(parameter.numel() for parameter in big.parameters())
    folder, small = save(big, torch.bfloat16), save(mixture(), torch.bfloat16, name="small")
    del big
    found = json.loads(fresh.TRANSFORMERS.run(SCRIPT, folder, small, "maxabs_hw"))
    limit = found["model"] + 3 * stack
    assert limit < 0.9 * whole, "loading all of it in high precision first would show"
    assert found["peak"] <= limit, f"peak {found['peak'] / MIB:.0f} MiB, limit {limit / MIB:.0f} MiB"
    print(f"peak {found['peak'] / MIB:.0f} MiB, FP8 model {found['model'] / MIB:.0f} MiB, stack {stack / MIB:.0f} MiB")
