"""Gradients of all operators but `linear`: against torch's autograd in float64, of the same without rounding."""

import pytest
import torch
import torch.nn.functional as F
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError

E4M3 = torch.float8_e4m3fn
GEOMETRY = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 2}
ATTENTION = {"scaling": 0.35, "softcap": 3.0, "dtype": E4M3, "full_scale": 448.0}
CONSTANTS = {"dtype": E4M3, "full_scale": 448.0}


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def assert_alike(result, expected, arguments, tolerance=1e-5):
    """The same gradients of a result as of one in float64, for a gradient of the result that tells its values apart."""
    grad = torch.randn(result.shape, dtype=result.dtype)
    found = torch.autograd.grad(result, arguments, grad)
    for each, right, argument in zip(
        found, torch.autograd.grad(expected, arguments, grad.double(), retain_graph=True), arguments, strict=True
    ):
        assert each.dtype is argument.dtype
        torch.testing.assert_close(each, right, rtol=tolerance, atol=tolerance * right.abs().max().item())


@over(transposed=[False, True], static=[False, True])
def test_conv(transposed, static):
    x, bias, scale = leaf(2, 4, 7, 5), leaf(6), torch.rand(6, 1, 1, 1) + 0.1
    codes, input_scale = torch.randn(6, 2, 3, 3).to(E4M3), torch.tensor([1 / 448.0])
    y = ops.conv(
        *(x, codes, scale, input_scale if static else None, bias), **GEOMETRY, transposed=transposed, full_scale=448.0
    )
    inside, weight = x.double().clamp(-1, 1) if static else x.double(), codes.double() * scale
    if transposed:
        weight = weight.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1)
    product = F.conv_transpose2d if transposed else F.conv2d
    assert_alike(y, product(inside, weight, bias.double(), **GEOMETRY), [x, bias])


@over(scales=["unrounded", "per row", "per expert"])
def test_grouped_linear(scales):
    x, bias, experts = leaf(9, 6), leaf(3, 8), torch.tensor([2, 0, 1, 1, -1, 0, 2, 7, 2])
    codes, scale = torch.randn(3, 8, 6).to(E4M3), torch.rand(3, 8, 1) + 0.1
    if scales == "per row":
        how = {"rounding": "pow2", "fp8_config": "E4M3", "target": "cpu", "hp_dtype": torch.float32}
        input_scale = ops.dynamic_scale(x, group=-1, divisor=448.0, **how)
    else:
        input_scale = None if scales == "unrounded" else torch.full((3, 1, 1), 1 / 448.0)
    y = ops.grouped_linear(x, experts, codes, scale, input_scale, bias, full_scale=448.0)
    inside = x.double().clamp(-1, 1) if scales == "per expert" else x.double()
    weight, here = codes.double() * scale, ((experts >= 0) & (experts < 3)).double().unsqueeze(1)
    of_rows = experts.clamp(0, 2)
    expected = (weight[of_rows] @ inside.unsqueeze(2)).squeeze(2) + bias.double()[of_rows]
    assert_alike(y, expected * here, [x, bias])


def mixture(x, table, weights, gate_up, down):
    gate, up = (x.unsqueeze(0) @ gate_up.transpose(1, 2)).chunk(2, dim=-1)
    outputs = (F.silu(gate) * up) @ down.transpose(1, 2)  # [E, tokens, hidden]
    chosen = F.one_hot(table, len(gate_up)).double() * weights.unsqueeze(-1)  # [tokens, k, E]
    return torch.einsum("tke,eth->th", chosen, outputs)


@over(rounded=[False, True])
def test_experts(rounded):
    x, weights, table = leaf(5, 16), leaf(5, 2), torch.stack([torch.randperm(3)[:2] for _ in range(5)])
    codes = [torch.randn(3, 24, 16).to(E4M3), torch.randn(3, 16, 12).to(E4M3)]
    scales = [torch.rand(3, 24, 1) / 4 + 0.1, torch.rand(3, 16, 1) + 0.1]
    input_scale = torch.full((5, 1), 0.01) if rounded else None
    y = ops.experts(
        *(x, table, weights, *codes, *scales, input_scale, None), activation="silu", experts_min=0, full_scale=448.0
    )
    dense = [code.double() * scale for code, scale in zip(codes, scales, strict=True)]
    expected = mixture(x.double(), table, weights.double(), *dense)
    if not rounded:
        assert_alike(y, expected, [x, weights], 1e-4)
        return
    grad = torch.randn(5, 16)
    for found, right in zip(
        torch.autograd.grad(y, [x, weights], grad), torch.autograd.grad(expected, [x, weights], grad), strict=True
    ):
        assert torch.cosine_similarity(found.flatten(), right.flatten(), dim=0) > 0.998


def attention(query, key, value, mask, sinks):
    scores = query @ key.repeat_interleave(2, 1).mT * ATTENTION["scaling"]
    scores = 3.0 * torch.tanh(scores / 3.0) + mask
    column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1], value.repeat_interleave(2, 1)


@over(dataflow=ops.DATAFLOWS, rounded=[False, True])
def test_attention(dataflow, rounded):
    arguments = [leaf(2, 4, 3, 8), leaf(2, 2, 5, 8), leaf(2, 2, 5, 6), leaf(2, 1, 3, 5), leaf(4)]
    query, key, value, mask, sinks = arguments
    scale, p_scale = (torch.tensor([0.02]), torch.tensor([1 / 448.0])) if rounded else (None, None)
    scales = (scale, scale, scale, p_scale, None)
    y = ops.attention(query, key, value, *scales, mask, sinks=sinks, dataflow=dataflow, **ATTENTION)
    weights = ops.attention_weights(
        *(query, key, scale, scale, p_scale, mask), sinks=sinks, dataflow=dataflow, **ATTENTION
    )
    probabilities, values = attention(*(each.double() for each in arguments))
    expected = (probabilities @ values).transpose(1, 2)
    if not rounded:
        assert_alike(y, expected, arguments, 1e-4)
        assert_alike(weights, probabilities, [query, key, mask, sinks], 1e-4)
        return
    grad = torch.randn(y.shape)
    for found, right in zip(
        torch.autograd.grad(y, arguments, grad), torch.autograd.grad(expected, arguments, grad), strict=True
    ):
        assert torch.cosine_similarity(found.flatten(), right.flatten(), dim=0) > 0.99


def test_attention_on_codes_of_a_cache():
    query, key, value = leaf(1, 4, 1, 8), torch.randn(1, 2, 6, 8).to(E4M3), torch.randn(1, 2, 6, 8).to(E4M3)
    one = torch.ones(1)
    y = ops.attention(query, key, value, None, one, one, None, None, None, **ATTENTION)
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.35
    values = value.double().repeat_interleave(2, 1)
    assert_alike(y, ((3.0 * torch.tanh(scores / 3.0)).softmax(-1) @ values).transpose(1, 2), [query], 1e-4)


@over(static=[False, True])
def test_matmul(static):
    a, b, scale = leaf(2, 3, 5), leaf(2, 5, 4), torch.tensor([1 / 448.0])
    y = ops.matmul(a, b, scale if static else None, scale if static else None, **CONSTANTS)
    if not static:
        assert_alike(y, a.double() @ b.double(), [a, b])
        return
    grad = torch.randn(y.shape)
    found = torch.autograd.grad(y, [a, b], grad)
    with torch.no_grad():
        rounded = [ops.cast_from_fp8(ops.cast_to_fp8(x, scale, E4M3, 448.0), scale, torch.float32) for x in (a, b)]
    expected = [grad @ rounded[1].mT * (a.abs() <= 1), rounded[0].mT @ grad * (b.abs() <= 1)]
    torch.testing.assert_close(found, tuple(expected))


def test_softmax():
    x, factor = leaf(3, 7), torch.tensor([2.0])
    y = ops.softmax(x, torch.tensor([1 / 448.0]), factor, **CONSTANTS)
    assert_alike(y, (x.double() * 2).softmax(-1), [x])


def products(x, mask, weights):
    """One of each operator, one behind the other."""
    image = x.reshape(2, 4, 4, 2)
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 2}
    y = ops.conv(image, KERNEL, ONE, ONE, None, **geometry, full_scale=448.0).reshape(8, 8)
    y = ops.grouped_linear(y, torch.arange(8) % 3, STACK, PER_EXPERT, None, None, full_scale=448.0)
    y = ops.experts(
        *(y, torch.arange(16).reshape(8, 2) % 3, weights, GATE_UP, STACK, PER_EXPERT, PER_EXPERT, None, None),
        activation="gelu",
        experts_min=0,
        full_scale=448.0,
    )
    heads = y.reshape(1, 2, 4, 8)
    y = ops.attention(heads, heads, heads, ONE, ONE, ONE, ONE / 448, None, mask, **ATTENTION)
    return ops.matmul(y, ops.softmax(y.mT, ONE / 448, **CONSTANTS), ONE, ONE, **CONSTANTS)


ONE, PER_EXPERT = torch.tensor([0.02]), torch.full((3, 1, 1), 0.3)
KERNEL, STACK, GATE_UP = (torch.randn(shape).to(E4M3) for shape in ((4, 2, 3, 3), (3, 8, 8), (3, 16, 8)))


def test_compiled_they_are_the_same():
    torch._dynamo.reset()
    arguments = [leaf(8, 8), leaf(4, 4), leaf(8, 2)]
    compiled = torch.compile(products, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(of(*arguments).sum(), arguments) for of in (compiled, products))
    assert all(map(torch.equal, found, expected)) and all(each.count_nonzero() for each in found)


def test_seen_by_a_profiler_they_are_the_same():
    arguments = [leaf(8, 8), leaf(4, 4), leaf(8, 2)]
    expected = torch.autograd.grad(products(*arguments).sum(), arguments)
    with torch.autograd.profiler.profile() as seen:
        found = torch.autograd.grad(products(*arguments).sum(), arguments)
    assert all(map(torch.equal, found, expected))
    assert "optimum_fp8::attention_gradient" in {event.name for event in seen.function_events}


def test_autocast_has_no_part_in_them():
    query, key = leaf(1, 2, 3, 8), leaf(1, 2, 3, 8)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            y = ops.attention(query, key, key, ONE, ONE, ONE, ONE / 448, None, None, **ATTENTION)
            found.append(torch.autograd.grad(y.sum(), [query, key]))
    assert all(map(torch.equal, *found))


def test_a_second_derivative_is_refused():
    a, b = leaf(3, 5), leaf(5, 4)
    (grad,) = torch.autograd.grad(ops.matmul(a, b, None, None, **CONSTANTS).sum(), a, create_graph=True)
    with pytest.raises(FP8NotAvailableError, match="no gradient through the gradient of optimum_fp8::matmul"):
        grad.sum().backward()


@pytest.mark.slow
@over(operator=["matmul", "softmax", "conv"])
def test_opcheck_with_gradients(operator):
    arguments = {
        "matmul": (leaf(3, 5), leaf(5, 4), ONE, ONE, E4M3, 448.0, "fused"),
        "softmax": (leaf(3, 5), ONE, None, -1, E4M3, 448.0),
        "conv": (leaf(2, 4, 5, 5), KERNEL, ONE, ONE, leaf(4), *[[1, 1]] * 3, False, [0, 0], 2, 448.0, "fused"),
    }[operator]
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.optimum_fp8, operator), arguments, test_utils=utils)
