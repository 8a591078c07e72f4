"""Compiled models on Gaudi's operators, emulated: one graph for a shape, and nothing is read back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from cache.conftest import CACHE, cache_of
from on_gaudi import NothingIsRead
from tiny_models import tiny_llama
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaForCausalLM, StaticCache

from optimum_fp8 import FP8Config, convert, ops, prepare, start_on_gaudi
from optimum_fp8.attention.function_mode import AttentionMode
from optimum_fp8.cache import in_fp8
from optimum_fp8.formats import number_format
from optimum_fp8.test_utils import gaudi

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
STEPS = 6
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(autouse=True)
def without_gradients():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


def llama(layers=1):
    """Layers whose scales differ on both targets, since the weights of each are larger than those of the one before."""
    config = tiny_llama().config
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for depth, layer in enumerate(model.model.layers):
        for parameter in layer.mlp.parameters():
            parameter.mul_(4.0**depth)
    return model


def converted(model, target="gaudi2", **options):
    prepare(model, FP8Config(target=target, **options))
    model.generate(IDS, **GREEDY)
    return convert(model)


def decode(model, forward, steps=STEPS):
    """A prompt by the model, then steps by `forward`, with a static cache: logits `[batch, 1 + steps, vocabulary]`."""
    cache = StaticCache(config=model.config, max_cache_len=24)
    logits = [model(IDS, **{CACHE: cache}).logits[:, -1:]]
    for _ in range(steps):
        logits.append(forward(logits[-1].argmax(-1), **{CACHE: cache}).logits)
    assert all(in_fp8(layer) for layer in cache.layers)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("target", ["gaudi2", "gaudi3"])
def test_generating_with_a_static_cache_gives_the_tokens_of_the_cpu(target):
    model = converted(llama(2), target, attention=True, kv_cache=True, attention_dataflow="fused")
    options = GREEDY | {"cache_implementation": "static", "disable_compile": True, "output_logits": True}
    expected = model.generate(IDS, **options, return_dict_in_generate=True)
    with gaudi.emulated(target) as device, ops.backend("hpu"):
        start_on_gaudi(model)
        found = model.generate(IDS, **options, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-2, rtol=0)
    layers = cache_of(found).layers
    assert all(in_fp8(layer) and type(layer.inner).__name__ == "StaticLayer" for layer in layers)
    assert {"cast_to_fp8_v2", "fp8_gemm_v2", "fp8_sdpa_recomp_fwd"} <= {call.name for call in device.calls}


@pytest.mark.parametrize(
    "target, backend", [("gaudi2", "aot_eager"), pytest.param("gaudi3", "eager", marks=pytest.mark.slow)]
)
def test_steps_of_decoding_compile_once(target, backend):
    """As one graph, without breaks; with fused attention, and the cache in FP8, written in place."""
    model = converted(llama(), target, attention=True, kv_cache=True)
    with gaudi.emulated(target) as device, ops.backend("hpu"):
        start_on_gaudi(model)
        expected = decode(model, model)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.equal(decode(model, compiled), expected)
        started = len(device.calls)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(decode(model, compiled), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    calls = device.calls[started:]
    assert {call.name for call in calls} == {"cast_to_fp8_v2", "cast_from_fp8", "fp8_gemm_v2", "fp8_sdpa_recomp_fwd"}
    assert all(call.free_scales for call in calls)


def graphs(model):
    """How many graphs there are if each layer is compiled on its own, and whether the logits are the same."""
    backend, expected = CompileCounter(), model(IDS, use_cache=False).logits
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    same = all(torch.equal(model(IDS, use_cache=False).logits, expected) for _ in range(2))
    return backend.frame_count, same


@pytest.mark.parametrize("scale_format, expected", [("const", 1), pytest.param("scalar", 3, marks=pytest.mark.slow)])
def test_layers_compiled_one_by_one(scale_format, expected):
    """Numbers are part of a graph, so layers with other scales have others; tensors are given to one graph for all."""
    model = converted(llama(3), "gaudi3", scale_format=scale_format)
    with gaudi.emulated("gaudi3") as device, ops.backend("hpu"):
        start_on_gaudi(model)
        assert graphs(model) == (expected, True)
    assert not counters["graph_break"]
    assert all(call.free_scales for call in device.calls)


def test_a_checkpoint_is_loaded_for_layers_that_are_compiled_one_by_one(tmp_path):
    converted(llama(), "gaudi2").save_pretrained(tmp_path)
    for options, overload in (({}, "scalar"), ({"quantization_config": FP8Config(scale_format="const")}, "default")):
        with gaudi.emulated("gaudi2") as device, ops.backend("hpu"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)(IDS)
        assert {call.overload for call in device.calls} == {overload}


# --- nothing is read back ---------------------------------------------------------------------------------------------


SCHEMES = {
    "static": {},
    "tensors": {"scale_format": "const"},
    "scales of channels": {"scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2"},
    "dynamic": {"activation_scheme": "dynamic"},
    "weights only": {"activation_scheme": "weight_only"},
    "qdq": {"use_qdq": True},
    "attention": {"attention": True, "kv_cache": True, "attention_dataflow": "fused"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_value_is_read_in_a_forward_pass(scheme):
    model = converted(llama(), **SCHEMES[scheme])
    with gaudi.emulated("gaudi2"), ops.backend("hpu"):
        start_on_gaudi(model)
        expected = decode(model, model, 2) if "kv_cache" in SCHEMES[scheme] else model(IDS).logits
        with NothingIsRead():
            found = decode(model, model, 2) if "kv_cache" in SCHEMES[scheme] else model(IDS).logits
    assert torch.equal(found, expected)


def test_what_reads_a_value_is_found():
    with NothingIsRead(), pytest.raises(AssertionError, match="optimum_fp8.ops.constants reads a value"):
        ops.mark_constant(torch.ones(1), number_format("E4M3", "gaudi2").hardware_scales)


READS = {
    "a condition": "if x.sum(): pass",
    "a number": "float(x[0])",
    "a search": "x.nonzero()",
    "a mask": "x[x > 0]",
    "a place in a list": "[1, 2][x[0].int()]",
    "a comparison": "torch.equal(x, x)",
    "a copy": "x.cpu()",
    "one of several": "2 in x",
}


@pytest.mark.parametrize("statement", READS.values(), ids=READS)
def test_each_way_to_read_a_value_is_found(statement):
    """In the package, also from within its mode of torch functions, which others' calls pass through."""
    x = torch.ones(3)
    for module, found in (("optimum_fp8.ops.casts", True), ("optimum_fp8.test_utils.gaudi.casts", False), ("a", False)):
        scope = {"__name__": module, "x": x, "torch": torch}
        for mode in (nullcontext(), AttentionMode(nn.Identity(), plan=None)):
            with NothingIsRead(), mode:
                expected = (
                    pytest.raises(AssertionError, match="optimum_fp8.ops.casts reads") if found else nullcontext()
                )
                with expected:
                    exec(statement, scope)
