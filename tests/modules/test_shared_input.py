"""Modules that share an input are computed in one go, and never hand out what belongs to another input."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, ops, quantization_report


class Attention(nn.Module):
    """The way attention modules of transformers call their projections."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(64, 48)
        self.k = nn.Linear(64, 32, bias=False)
        self.v = nn.Linear(64, 16)
        self.o = nn.Linear(64, 64)
        self.use_v = True
        self.between = None

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        if self.between is not None:
            self.between(x)
        v = self.v(x) if self.use_v else x.new_zeros((*x.shape[:-1], 16))
        return self.o(torch.cat([q[..., :16], k, v], -1))


def double(x):
    x.mul_(2)


def clear_a_row(x):
    x[0].zero_()


def break_and_double(x):
    torch._dynamo.graph_break()
    x.mul_(2)


CHANGES = {change.__name__: change for change in (double, clear_a_row, break_and_double)}
BACKEND = ops.cpu.backends()[0]


@pytest.fixture(params=["weight_only", "dynamic"])
def model(request):
    return convert(nn.Sequential(Attention(), Attention()).bfloat16(), FP8Config(activation_scheme=request.param))


@pytest.fixture
def together(monkeypatch):
    """How many weights each call of `linears` had."""
    sizes, linears = [], ops.linears

    def counting(x, weights, *rest, **options):
        sizes.append(len(weights))
        return linears(x, weights, *rest, **options)

    monkeypatch.setattr(ops, "linears", counting)
    return sizes


def compiled(model, backend, fullgraph=True):
    """The model as a graph that no earlier run has left somewhere."""
    torch._dynamo.reset()
    graph = torch.compile(model, backend=backend, fullgraph=fullgraph)

    def run(x):
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            return graph(x)

    return run


def alone(model, x):
    """The output with every module computed by itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "shared_input"):
            module.shared_input = None
    return model(x)


@torch.no_grad()
def test_followers_are_learnt_and_computed_together(model, together):
    for _ in range(3):
        x = torch.randn(2, 5, 64).bfloat16()
        assert torch.equal(model(x), alone(model, x))
    assert together == [3, 3] * 2, "q, k and v of both layers, from the second call on"


@torch.no_grad()
def test_calls_are_counted_for_each_module(model):
    for _ in range(3):
        model(torch.randn(1, 64).bfloat16())
    assert {sum(module.kernels.values()) for module in quantization_report(model).modules} == {3}


@torch.no_grad()
def test_an_input_changed_in_between_is_computed_anew(model):
    for _ in range(2):
        model(torch.randn(1, 64).bfloat16())
    x = torch.randn(1, 64).bfloat16()
    layer = model[0]
    layer.between = lambda x: x.mul_(2)
    assert torch.equal(layer(x.clone()), alone(layer, x.clone()))


@torch.no_grad()
def test_who_no_longer_follows_is_left_out(model, together):
    for _ in range(2):
        model(torch.randn(1, 64).bfloat16())
    model[0].use_v = False
    together.clear()
    for _ in range(3):
        x = torch.randn(1, 64).bfloat16()
        assert torch.equal(model(x), alone(model, x))
    assert together == [3, 3, 2, 3, 2, 3]


@torch.no_grad()
def test_hooks_see_every_module(model):
    seen = []
    for name, module in model[0].named_children():
        module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, tuple(output.shape))))
    for _ in range(2):
        seen.clear()
        model(torch.randn(1, 64).bfloat16())
    assert seen == [("q", (1, 48)), ("k", (1, 32)), ("v", (1, 16)), ("o", (1, 64))]


def test_with_gradients_and_in_inference_mode_each_is_computed_alone(model, together):
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(1, 64).bfloat16()
            assert torch.equal(model(x), alone(model, x))
    assert together == []


@torch.no_grad()
def test_copies_and_pickles_learn_for_themselves(model, together):
    for _ in range(2):
        model(torch.randn(1, 64).bfloat16())
    shared = model[0].q.shared_input
    clone = copy.deepcopy(model)
    assert clone[0].q.shared_input is clone[0].v.shared_input is not shared
    assert not clone[0].q.shared_input.followers and not pickle.loads(pickle.dumps(shared)).followers


@torch.no_grad()
def test_different_static_scales_stay_different():
    """Siblings normally have the scale of their common input; where they do not, each is rounded with its own."""
    config = FP8Config(scale_method="unit_scale")
    layer = convert(nn.Sequential(Attention()).bfloat16(), config)[0]
    layer.k.input_scale.fill_(0.25)
    for _ in range(3):
        x = torch.randn(3, 64).bfloat16() * 40
        assert torch.equal(layer(x), alone(layer, x))


@torch.no_grad()
def test_modules_that_change_are_learnt_anew(model):
    x = torch.randn(3, 64).bfloat16()
    for _ in range(2):
        model(x)
    q, k, v = model[0].q, model[0].k, model[0].v
    assert q.shared_input.followers[q] == [k, v]
    v.start(dataclasses.replace(v.recipe, arithmetic="qdq"), v.input_scale)
    assert not q.shared_input.followers
    for _ in range(3):
        torch.testing.assert_close(model(x), alone(model, x), rtol=0, atol=0)
    assert q.shared_input.followers[q] == [k]  # v no longer goes with it
    model.to("cpu")
    assert not q.shared_input.followers


def test_compiled_they_are_computed_together(model):
    """The graph shows who shares an input; nothing has to be seen before."""
    x = torch.randn(3, 64).bfloat16()
    found = compiled(model, "inductor")(x)
    assert [row.kernels for row in quantization_report(model).modules] == [{BACKEND: 1}] * 8
    records = [ops.calls(module.owner).kernels for module in model[0].children()]
    assert [op for record in records for op, _ in record] == ["linears", "linears", "linears", "linear"]
    assert torch.equal(found, alone(model, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_compiled_an_input_that_changes_in_between_is_seen(model, backend, change):
    """Also where eager calls have seen modules go together, and between two graphs."""
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        for attention in model:
            attention.between = change
        expected = alone(model, x.clone())
    run = compiled(model, backend, fullgraph=change is not break_and_double)
    for _ in range(2):
        torch.testing.assert_close(run(x.clone()), expected, rtol=0, atol=0)
