"""The gradient of a linear layer in FP8: against float64, with torch's autograd, compiled, checkpointed and traced."""

import copy

import pytest
import torch
from grids import over
from torch import nn
from torch.utils.checkpoint import checkpoint

from optimum_fp8 import FP8Config, convert, ops
from optimum_fp8.errors import FP8NotAvailableError, FP8OperandError, FP8ScaleError
from optimum_fp8.ops.operands import broadcast_scale

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OUT, IN = 160, 130
SCALES = {"tensor": (1,), "channel": (OUT, 1), "blocks": (2, 2), "groups": (OUT, 5)}
# A sum of OUT products in float32, then one rounding to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def operands(layout="channel", weight_dtype=E4M3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator).to(weight_dtype)
    return weight, torch.rand(SCALES[layout], generator=generator) + 0.1


def dequantized(weight, scale):
    return weight.double() * broadcast_scale(scale, weight).double()


def linear(x, weight, scale, input_scale=None, bias=None, **options):
    return ops.linear(x, weight, scale, input_scale, bias, **{"full_scale": 448.0, **options})


def assert_is(found, expected, magnitudes, dtype):
    """Within the rounding of the result, and of a sum of float32 whose terms have these magnitudes in sum."""
    assert found.dtype is dtype
    bound = TOLERANCE[dtype] * expected.abs() + 2**-20 * magnitudes + 1e-30
    assert bool(((found.double() - expected).abs() <= bound).all())


@over(layout=SCALES, dtype=list(TOLERANCE), weight_dtype=[E4M3, E5M2])
def test_it_is_that_of_the_dequantized_product(layout, dtype, weight_dtype):
    weight, scale = operands(layout, weight_dtype)
    x = torch.randn(3, 5, IN).to(dtype).requires_grad_()
    grad = torch.randn(3, 5, OUT).to(dtype)
    linear(x, weight, scale).backward(grad)
    dense = dequantized(weight, scale)
    assert_is(x.grad, grad.double() @ dense, grad.double().abs() @ dense.abs(), dtype)


@over(full_scale=[448.0, 240.0], arithmetic=ops.ARITHMETICS)
def test_it_is_zero_where_a_static_scale_saturates_the_input(full_scale, arithmetic):
    weight, scale = operands()
    x, input_scale = torch.randn(7, IN).requires_grad_(), torch.tensor([1.0 / full_scale])
    with torch.no_grad():
        x[0, :3] = torch.tensor([1.0, -1.0, 1.0 + 2**-20])
    grad = torch.randn(7, OUT)
    linear(x, weight, scale, input_scale, full_scale=full_scale, arithmetic=arithmetic).backward(grad)
    dense, inside = dequantized(weight, scale), x.detach().double().abs() <= input_scale.double() * full_scale
    inside[0, :3] = torch.tensor([True, True, False])
    assert 0 < inside.sum() < inside.numel()
    assert_is(x.grad, (grad.double() @ dense) * inside, grad.double().abs() @ dense.abs(), torch.float32)


@over(group=[0, -1])
def test_a_dynamic_scale_counts_as_a_constant_and_lets_all_through(group):
    weight, scale = operands()
    x, grad = torch.randn(7, IN).requires_grad_(), torch.randn(7, OUT)
    how = {"rounding": "identity", "fp8_config": "E4M3", "target": "cpu", "hp_dtype": torch.bfloat16}
    # A range that is rounded down to bfloat16: the largest value lies beyond what its scale reaches.
    input_scale = ops.dynamic_scale(x, group=group, divisor=480.0, **how)
    linear(x, weight, scale, input_scale).backward(grad)
    dense = dequantized(weight, scale)
    assert_is(x.grad, grad.double() @ dense, grad.double().abs() @ dense.abs(), torch.float32)


@over(dtype=list(TOLERANCE), bias_dtype=[torch.float32, torch.bfloat16])
def test_that_of_the_bias_is_a_sum_in_float32(dtype, bias_dtype):
    weight, scale = operands()
    bias, grad = torch.zeros(OUT, dtype=bias_dtype, requires_grad=True), torch.randn(2, 40, OUT).to(dtype)
    x = torch.randn(2, 40, IN).to(dtype)
    y = linear(x, weight, scale, bias=bias)
    y.backward(grad)
    torch.testing.assert_close(bias.grad, grad.double().sum((0, 1)).to(bias_dtype), rtol=2**-8, atol=1e-5)
    assert x.grad is None


def test_codes_and_scales_have_none():
    weight, scale = operands()
    scale.requires_grad_()
    x = torch.randn(2, IN, requires_grad=True)
    found = torch.autograd.grad(linear(x, weight, scale).sum(), [x, scale], allow_unused=True)
    assert found[0] is not None and found[1] is None


@over(dynamic=[True, False])
def test_the_input_is_kept_only_where_it_may_saturate(dynamic):
    weight, scale = operands()
    x = torch.randn(2, IN, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, weight, scale, None if dynamic else torch.ones(1))
    assert {weight.data_ptr(), scale.data_ptr()} <= {tensor.data_ptr() for tensor in kept}
    assert len(kept) == (2 if dynamic else 4) and dynamic != (x.data_ptr() in {tensor.data_ptr() for tensor in kept})


def test_what_was_kept_must_not_be_written_to():
    weight, scale = operands()
    x = torch.randn(2, IN, requires_grad=True)
    hidden = x * 1
    y = linear(hidden, weight, scale, torch.ones(1))
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def mlp(scheme="dynamic", **options):
    torch.manual_seed(0)
    config = FP8Config(activation_scheme=scheme, quantize_lm_head=True, **options)
    return convert(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)), config)


class Adapted(nn.Module):
    """An FP8 model with a low-rank adapter beside its first layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 4, bias=False), nn.Linear(4, 48, bias=False)
        nn.init.zeros_(self.up.weight)
        self.base.requires_grad_(False)

    def forward(self, x):
        first, act, last = self.base
        return last(act(first(x) + self.up(self.down(x))))


SCHEMES = {
    "dynamic": {"scheme": "dynamic"},
    "weight_only": {"scheme": "weight_only"},
    "static": {"scheme": "static", "scale_method": "unit_scale"},
}


@over(scheme=SCHEMES)
def test_an_adapter_on_a_frozen_base_is_trained(scheme):
    model, x, target = Adapted(mlp(**SCHEMES[scheme])), torch.randn(64, 32), torch.randn(64, 32)
    codes = model.base[0].weight.view(torch.uint8).clone()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(codes, model.base[0].weight.view(torch.uint8))
    assert all(parameter.grad is None for parameter in model.base.parameters())


@over(scheme=SCHEMES)
def test_a_compiled_step_of_training_is_the_same(scheme):
    torch._dynamo.reset()
    model = Adapted(mlp(**SCHEMES[scheme]))
    nn.init.normal_(model.up.weight)
    other = copy.deepcopy(model)

    def step(model):
        return lambda x: model(x).square().mean()

    compiled = torch.compile(step(model), fullgraph=True, backend="aot_eager")
    for rows in (5, 9):  # the second time with symbolic sizes
        x = torch.randn(rows, 32)
        compiled(x).backward()
        step(other)(x).backward()
    assert torch.equal(model.up.weight.grad, other.up.weight.grad)
    assert torch.equal(model.down.weight.grad, other.down.weight.grad)


@over(reentrant=[False, True])
def test_checkpointed_it_is_the_same(reentrant):
    model, x = mlp(), torch.randn(6, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_autocast_changes_only_what_autocast_changes():
    model, x = mlp(), torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype is torch.bfloat16 and x.grad.dtype is torch.float32
    low = x.detach().bfloat16().requires_grad_()
    model(low).float().square().sum().backward()
    torch.testing.assert_close(x.grad, low.grad.float(), rtol=2**-6, atol=2**-6)


def test_a_second_derivative_is_refused():
    x = torch.randn(2, IN, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, *operands()).square().sum(), x, create_graph=True)
    with pytest.raises(FP8NotAvailableError, match="no gradient through the gradient of optimum_fp8::linear"):
        grad.sum().backward()


def test_it_is_counted_for_the_module():
    model, x = mlp(), torch.randn(6, 32, requires_grad=True)
    model(x).sum().backward()
    for layer in (model[0], model[2]):
        counts = {op: count for (op, _), count in layer.record.kernels.items()}
        assert counts["linear"] == counts["linear_input_gradient"] == 1


@over(rows=[0, 1])
def test_empty_and_single_rows(rows):
    x = torch.randn(rows, IN, requires_grad=True)
    linear(x, *operands(), torch.ones(1)).sum().backward()
    assert x.grad.shape == (rows, IN)


def test_nan_and_infinity_propagate():
    weight, scale = operands()
    grad = torch.randn(4, OUT)
    grad[1, 3], grad[2, 5] = torch.nan, torch.inf
    found = ops.linear_input_gradient(grad, weight, scale, None, None, full_scale=448.0)
    assert found[1].isnan().all() and not found[2].isfinite().any() and found[[0, 3]].isfinite().all()


def test_a_nan_in_the_input_does_not_saturate():
    x = torch.full((1, IN), torch.nan, requires_grad=True)
    linear(x, *operands(), torch.ones(1)).nan_to_num().sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, IN))  # of nan_to_num
    grad = torch.ones(1, OUT)
    assert ops.linear_input_gradient(grad, *operands(), x, torch.ones(1), full_scale=448.0).count_nonzero()


def test_misfits_are_refused():
    weight, scale = operands()
    grad, x = torch.randn(4, OUT), torch.randn(4, IN)
    for wrong in ({"grad": x}, {"x": x[:2]}, {"grad": grad.to(E4M3)}, {"weight": weight.float()}):
        call = {"grad": grad, "weight": weight, "weight_scale": scale, "x": x, "input_scale": torch.ones(1)} | wrong
        with pytest.raises(FP8OperandError, match="linear_input_gradient: "):
            ops.linear_input_gradient(**call, full_scale=448.0)
    for wrong in ({"weight_scale": torch.ones(7, 1)}, {"input_scale": torch.ones(3)}):
        call = {"grad": grad, "weight": weight, "weight_scale": scale, "x": x, "input_scale": torch.ones(1)} | wrong
        with pytest.raises(FP8ScaleError):
            ops.linear_input_gradient(**call, full_scale=448.0)


@over(static=[False, True])
def test_opcheck_with_gradients(static):
    weight, scale = torch.randn(8, 6).to(E4M3), torch.rand(8, 1) + 0.1
    x, bias = torch.randn(4, 6, requires_grad=True), torch.randn(8, requires_grad=True)
    arguments = (x, weight, scale, torch.tensor([0.002]) if static else None, bias, 448.0, "fused")
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.optimum_fp8.linear, arguments, test_utils=utils)
