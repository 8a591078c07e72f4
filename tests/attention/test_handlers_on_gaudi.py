"""FP8 attention of transformers' models on an emulated Gaudi: a prompt and steps after it, beside the CPU's.

The same model is converted for the same card twice, and once runs on Gaudi's operators.
"""

from __future__ import annotations

import copy

import pytest
import torch
from attention_models import FAMILIES, IDS

from optimum_fp8 import FP8Config, convert, ops, prepare, quantization_report, start_on_gaudi
from optimum_fp8.errors import FP8ScaleError
from optimum_fp8.test_utils import gaudi

STEPS = 3
IN_STEPS = "hpu: in steps, not in the fused kernel: "
CASES = {  # family, options, reason why the fused kernel did not run, what is called for attention
    "unfused": ("llama", {"attention_dataflow": "unfused"}, None, {"fp8_gemm_v2", "softmax_fp8"}),
    "fused": ("llama", {}, None, {"fp8_sdpa_recomp_fwd"}),
    "dynamic": (
        "llama",
        {"attention_dataflow": "unfused", "activation_scheme": "dynamic", "scale_method": "maxabs_arbitrary"},
        None,
        {"fp8_gemm_v2", "softmax_fp8", "cast_from_fp8"},
    ),
    "qdq": ("llama", {"use_qdq": True}, None, {"cast_from_fp8"}),
    "cache alone": ("llama", {"attention": False}, "queries without a scale", {"cast_from_fp8"}),
    "soft cap": ("gemma2, soft cap", {}, "a soft cap: the kernel has none", {"fp8_gemm_v2"}),
    "sinks": ("gpt_oss, sinks", {}, "sinks: fp8_fused_sdpa takes none", {"fp8_gemm_v2"}),
    "sinks, unfused": ("gpt_oss, sinks", {"attention_dataflow": "unfused"}, None, {"fp8_gemm_v2", "softmax_fp8"}),
}


@torch.no_grad()
def logits(model, tokens):
    """Of a prompt, and of steps whose tokens are given: `[batch, prompt + steps, vocabulary]`."""
    found = model(IDS, use_cache=True)
    every = [found.logits]
    for step in range(STEPS):
        found = model(tokens[:, step : step + 1], past_key_values=found.past_key_values, use_cache=True)
        every.append(found.logits)
    return torch.cat(every, dim=1).float()


@pytest.mark.parametrize("target, case", [*(("gaudi2", case) for case in CASES), ("gaudi3", "unfused")])
def test_logits_are_those_of_the_cpu(target, case):
    family, options, reason, operators = CASES[case]
    options = {"attention": True, "kv_cache": True, "target": target} | options
    tokens = torch.randint(3, 60, (2, STEPS), generator=torch.Generator().manual_seed(0))
    model = FAMILIES[family].make().bfloat16()
    model = prepare(model, FP8Config(allowlist={"names": ["attn"]}, **options))
    expected = logits(model, tokens)
    on_cpu = logits(convert(copy.deepcopy(model)), tokens)
    with gaudi.emulated(target) as device, ops.backend("hpu"):
        convert(model)
        device.calls.clear()
        found = logits(model, tokens)
    assert {call.name for call in device.calls} >= operators
    report = quantization_report(model)
    assert all(row.cached for row in report.attention) and set(report.kernels) == {"hpu"}
    reasons = {IN_STEPS + reason: 1 + STEPS} if reason else {}
    assert all(row.fallbacks == reasons for row in report.attention)
    logs = [x.log_softmax(-1).flatten(0, 1) for x in (found, on_cpu, expected)]
    divergence = torch.nn.functional.kl_div(*logs[:2], log_target=True, reduction="batchmean")
    from_unrounded = torch.nn.functional.kl_div(logs[1], logs[2], log_target=True, reduction="batchmean")
    assert divergence <= 1e-6 and torch.equal(found.argmax(-1), on_cpu.argmax(-1))
    assert from_unrounded > 10 * divergence


@pytest.mark.parametrize("name", ["k", "v"])
def test_unsound_scales_of_a_cache_are_refused_before_the_first_forward_pass(name):
    """Looking at them then would wait for the device in it."""
    model = prepare(FAMILIES["llama"].make().bfloat16(), FP8Config(attention=True, kv_cache=True, target="gaudi2"))
    model(IDS)
    convert(model).model.layers[-1].self_attn.fp8_scales.get(f"{name}_scale").fill_(torch.nan)
    message = rf"model.layers.\d.self_attn: the {name} scale of its cache is \[nan\], expected finite values above 0"
    with gaudi.emulated("gaudi2"), ops.backend("hpu"), pytest.raises(FP8ScaleError, match=message):
        start_on_gaudi(model)
