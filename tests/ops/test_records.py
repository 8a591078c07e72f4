"""Records of calls: one a module, found for calls without one by the module's tensors, gone with the module."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from optimum_fp8 import ops
from optimum_fp8.ops import declare, dispatch, records

E4M3 = torch.float8_e4m3fn
BEST = ops.cpu.backends()[0]
SIZE = 32


class Block(nn.Module):
    """A layer of a model: a product with an FP8 weight, counted in a record of its own."""

    def __init__(self, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE).to(E4M3), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(SIZE, 1) + 0.5, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(SIZE)) if bias else None
        self.record = ops.CallRecord()
        self.record.watch(self.weight)

    def forward(self, x):
        y = ops.linear(x, self.weight, self.weight_scale, None, self.bias, full_scale=448.0, record=self.record)
        return torch.relu(y)


@pytest.fixture
def attributed(monkeypatch):
    """Tensors that are watched by a test are forgotten after it."""
    monkeypatch.setattr(records, "_watched", weakref.WeakValueDictionary())


@pytest.mark.core
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_equal_blocks_share_one_graph_and_are_counted_apart(mode):
    torch._dynamo.reset()
    counters.clear()
    blocks, backend = [Block() for _ in range(12)], CompileCounter()
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    x = torch.randn(2, SIZE)
    with mode():
        for index, block in enumerate(blocks):
            for _ in range(index + 1):
                assert torch.equal(block(x), Block.forward(block, x))
    assert backend.frame_count == 1 and counters["stats"]["unique_graphs"] == 1
    assert [block.record.kernels for block in blocks] == [{("linear", BEST): 2 * (n + 1)} for n in range(12)]


@pytest.mark.slow
def test_graphs_of_inductor_are_attributed_too():
    torch._dynamo.reset()
    blocks, x = [Block() for _ in range(3)], torch.randn(2, SIZE)
    for block in blocks:
        block.compile(fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            for block in blocks:
                block(x)
    assert [block.record.kernels for block in blocks] == [{("linear", BEST): 2}] * 3


def test_dropped_models_leave_nothing_behind():
    gc.collect()
    tables = [records._watched, dispatch._kernels, dispatch._missing, dispatch._missing_devices, dispatch._warned]
    sizes = [len(table) for table in tables]
    for _ in range(4):
        model = nn.Sequential(*(Block() for _ in range(20)))
        with torch.no_grad():
            model(torch.randn(3, SIZE))
        kept = [weakref.ref(block.record) for block in model]
        kept += [weakref.ref(block.record.prepared["linear"].run) for block in model]
        kept += [weakref.ref(block.weight) for block in model]
        assert all(block.record.kernels == {("linear", BEST): 1} for block in model)
        del model
        gc.collect()
        assert not any(ref() for ref in kept)
    assert [len(table) for table in tables] == sizes


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_module_counts_its_own_calls(again):
    block = Block()
    with torch.no_grad():
        block(torch.randn(1, SIZE))
    twin = again(block.record)
    assert twin is not block.record and type(twin) is ops.CallRecord
    assert not twin.kernels and not twin.fallbacks and not twin.prepared
    assert copy.deepcopy(block).record.kernels == {} and block.record.kernels == {("linear", BEST): 1}


def operands():
    one = torch.ones(1)
    return torch.randn(2, SIZE), torch.randn(SIZE, SIZE).to(E4M3), one, None, None


def test_calls_through_the_dispatcher_are_attributed_by_the_weight(attributed):
    first, second = ops.CallRecord(), ops.CallRecord()
    one, other = operands(), operands()
    first.watch(one[1], None)
    second.watch(other[1])
    for count in (1, 2):
        torch.ops.optimum_fp8.linear(*one, 448.0, "fused")
        assert first.kernels == {("linear", BEST): count} and not second.kernels
    torch.ops.optimum_fp8.linear(*other, 448.0, "fused")
    assert second.kernels == {("linear", BEST): 1}
    second.watch(one[1])  # a shared tensor: the last to watch it
    torch.ops.optimum_fp8.linear(*one, 448.0, "fused")
    assert second.kernels == {("linear", BEST): 2} and first.kernels == {("linear", BEST): 2}


def test_a_record_that_is_given_is_preferred_to_the_one_that_watches(attributed):
    watching, given, data = ops.CallRecord(), ops.CallRecord(), operands()
    watching.watch(data[1])
    x = data[0].requires_grad_()  # a call that takes the way through the dispatcher
    ops.linear(x, *data[1:], full_scale=448.0, record=given)
    assert given.kernels == {("linear", BEST): 1} and not watching.kernels
    ops.linear(x, *data[1:], full_scale=448.0)
    assert watching.kernels == {("linear", BEST): 1}
    assert declare._calling.get() is None


def test_convolutions_and_attention_are_attributed(attributed):
    record, weight = ops.CallRecord(), torch.randn(4, 3, 2, 2).to(E4M3)
    one, p_scale, a_scale = torch.ones(1), torch.ones(1), torch.ones(1)
    record.watch(weight, p_scale, a_scale)
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    torch.ops.optimum_fp8.conv(torch.randn(1, 3, 4, 4), weight, one, None, None, *geometry, 448.0, "fused")
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    options = (None, None, 0.5, 0.0, E4M3, 448.0, "fused")
    torch.ops.optimum_fp8.attention(q, k, v, one, one, one, p_scale, None, *options)
    torch.ops.optimum_fp8.attention_weights(q, k, one, one, p_scale, *options)
    torch.ops.optimum_fp8.matmul(q, k.mT, a_scale, one, E4M3, 448.0, "fused")
    assert {op for op, _ in record.kernels} == {"conv", "attention", "attention_weights", "matmul"}
    assert set(record.kernels.values()) == {1}


def test_tensors_without_memory_are_not_watched(attributed):
    record = ops.CallRecord()
    record.watch(torch.empty(3, device="meta"), torch.empty(0), None)
    assert not records._watched


def test_noting_a_fallback():
    record = ops.CallRecord()
    ops.note_fallback(record, "attention", "a dropout of 0.1")
    ops.note_fallback(None, "attention", "nobody counts")
    assert record.fallbacks == {("attention", "high precision", "a dropout of 0.1"): 1}
