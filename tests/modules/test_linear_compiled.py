"""Compiled models: equal FP8 layers share one graph as those in high precision do, and dropped models leave nothing."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from grids import slow_but
from tiny_models import tiny_llama
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention import plan_of
from optimum_fp8.modules import fp8_modules
from optimum_fp8.ops import dispatch, records

LAYERS = 12
IDS = torch.randint(3, 64, (1, 7), generator=torch.Generator().manual_seed(0))
CASES = {
    "static": {},
    "dynamic": {"activation_scheme": "dynamic"},
    "weight only": {"activation_scheme": "weight_only"},
    "per channel": {"scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2"},
    "gaudi2": {"target": "gaudi2"},
    "attention": {"attention": True},
}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def llama(layers=LAYERS):
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_hidden_layers = layers
    config.layer_types = None
    return LlamaForCausalLM(config).eval()


def converted(model, **options):
    prepare(model, FP8Config(**{"target": "cpu", **options}))
    logits(model)
    return convert(model)


def compiled_by_layer(model):
    """Graphs that are compiled where each layer is compiled on its own, and the logits."""
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=backend)
    found = logits(model)
    assert torch.equal(logits(model), found), "and again, compiled"
    return backend.frame_count, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), found


@pytest.fixture(scope="module")
def in_high_precision():
    return compiled_by_layer(llama())[:3]


@pytest.mark.core
@pytest.mark.parametrize("case", slow_but(CASES, "static", "dynamic", "attention"))
def test_equal_layers_share_one_graph(case, in_high_precision):
    model = converted(llama(), **CASES[case])
    expected = logits(model)
    again = copy.deepcopy(model)
    frames, graphs, breaks, found = compiled_by_layer(again)
    assert (frames, graphs, breaks) == in_high_precision == (1, 1, 0)
    assert torch.equal(found, expected)


def test_layers_compiled_with_attention_still_return_probabilities_to_who_asks():
    model = converted(llama(2), attention=True)
    with torch.no_grad():
        expected = model(IDS, use_cache=False, output_attentions=True).attentions
    again = converted(llama(2), attention=True)
    compiled_by_layer(again)
    for _ in range(2):
        with torch.no_grad():
            found = again(IDS, use_cache=False, output_attentions=True).attentions
        assert len(found) == 2 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.core
@pytest.mark.parametrize("case", ["static", "attention"])
def test_calls_of_compiled_layers_are_counted_by_module(case):
    model = converted(llama(4), **CASES[case])
    for layer in model.model.layers:
        layer.compile(backend=CompileCounter())
    logits(model)
    before = {name: sum(module.record.kernels.values()) for name, module in fp8_modules(model).items()}
    for _ in range(3):
        logits(model)
    after = {name: sum(module.record.kernels.values()) for name, module in fp8_modules(model).items()}
    assert {name: after[name] - before[name] for name in after} == dict.fromkeys(after, 3)
    report = quantization_report(model)
    assert all(sum(row.kernels.values()) == after[row.name] for row in report.quantized)
    assert all(sum(row.kernels.values()) >= 3 for row in report.attention)


def test_a_layer_that_differs_has_a_graph_of_its_own():
    overrides = {r"layers\.1\.mlp": {"fp8_config": "E5M2"}}
    model = converted(llama(3), overrides=overrides)
    expected = logits(model)
    frames, _, breaks, found = compiled_by_layer(model)
    assert (frames, breaks) == (2, 0) and torch.equal(found, expected)


@pytest.mark.core
def test_dropped_models_leave_nothing_behind():
    """Four models of twenty modules, run and dropped: neither they nor their records stay, and no table has grown."""
    gc.collect()
    before = len(records._watched), {op: len(kernels) for op, kernels in dispatch._kernels.items()}
    dropped = []
    for _ in range(4):
        model = converted(llama(3), attention=True, allowlist={"names": ["layers"]})
        modules = fp8_modules(model)
        held = [module.record for module in modules.values()] + [
            plan_of(layer.self_attn).record for layer in model.model.layers
        ]
        assert len(modules) == 21
        logits(model)
        assert all(record.kernels for record in held)
        dropped += [weakref.ref(each) for each in (*held, *modules.values())]
        del model, modules, held
        gc.collect()
        assert not [ref for ref in dropped if ref() is not None]
        assert (len(records._watched), {op: len(kernels) for op, kernels in dispatch._kernels.items()}) == before
