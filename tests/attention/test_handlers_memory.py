"""What a decode step makes of a cache: attention takes its codes, in models that multiply themselves too."""

from __future__ import annotations

import pytest
import torch
from attention_models import FAMILIES, Family
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention.detect import Kind, attention_modules
from optimum_fp8.cache import FP8Tensor
from optimum_fp8.ops import declare, reference_attention

PROMPT = torch.arange(3, 53).repeat(16, 1)  # so many that keys have more elements than any weight
OWN = [
    name
    for name, family in FAMILIES.items()
    if family.cached and set(attention_modules(family.make()).values()) == {Kind.FUNCTIONS}
]


class Largest(TorchDispatchMode):
    """The largest high-precision tensor that any operator makes; those that are stored in FP8 only seem to be one."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, torch.Tensor) and not isinstance(x, FP8Tensor) and x.element_size() > 1:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.fixture
def largest(monkeypatch):
    """Watches inside our own operators too, which take blocks that are far shorter than the cache."""
    mode, dequantize = Largest(), FP8Tensor.dequantize
    monkeypatch.setattr(declare, "is_plain", lambda arguments: True)
    monkeypatch.setattr(reference_attention, "_BLOCK", 16)

    def watched(self):
        mode.elements = max(mode.elements, self.codes.numel())
        return dequantize(self)

    monkeypatch.setattr(FP8Tensor, "dequantize", watched)
    return mode


@torch.no_grad()
def decoded(family: Family, mode: Largest, static_cache: bool, **options) -> tuple[int, int]:
    """Elements of the largest tensor in a decode step, and of a layer's keys."""
    model = family.make().bfloat16()
    config = FP8Config(blocklist={"types": ["Linear", "FalconLinear", "Conv1D"]}, kv_cache=True, **options)
    prepare(model, config)
    model(PROMPT)
    convert(model)
    given = {"past_key_values": StaticCache(model.config, max_cache_len=PROMPT.shape[1] + 8)} if static_cache else {}
    cache = model(PROMPT, use_cache=True, **given).past_key_values
    model(PROMPT[:, :1], past_key_values=cache)
    with mode:
        model(PROMPT[:, 1:2], past_key_values=cache)
    report = quantization_report(model)
    assert all(row.quantized and row.cached and row.kernels and not row.fallbacks for row in report.attention), report
    return mode.elements, cache.layers[0].inner.keys.numel()


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "cache only"])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize(
    "name, kind",
    # With ALiBi, Falcon does not fit static caches in transformers.
    [(name, kind) for name in OWN for kind in ("growing", "static") if (name, kind) != ("falcon, alibi", "static")],
)
def test_no_high_precision_copy_of_keys_or_values(largest, name, kind, scheme, attention):
    elements, keys = decoded(FAMILIES[name], largest, kind == "static", activation_scheme=scheme, attention=attention)
    assert 0 < elements < keys


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gptj"])
def test_nor_by_models_that_call_attention_by_name(largest, name, scheme):
    elements, keys = decoded(FAMILIES[name], largest, False, activation_scheme=scheme, attention=True)
    assert 0 < elements < keys


def test_a_copy_would_be_seen(largest):
    elements, keys = decoded(FAMILIES["bloom"], largest, False, use_qdq=True, attention=True)
    assert elements >= keys
