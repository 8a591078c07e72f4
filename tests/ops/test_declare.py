"""The operators as torch sees them: schema, fake kernels, torch.compile, and gradients that there are none of."""

import itertools

import pytest
import torch
from grids import over
from torch._subclasses.fake_tensor import FakeTensorMode

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError, FP8OperandError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NAMESPACE = torch.ops.optimum_fp8
X = torch.randn(4, 6)
SCALE = torch.tensor([0.5])
WEIGHT = torch.randn(8, 6).to(E4M3)
IMAGE = torch.randn(2, 4, 7, 5)
KERNEL = torch.randn(6, 2, 3, 3).to(E4M3)
ROWS = torch.rand(4, 1) + 0.1
LINE, KERNEL_1D, KERNEL_3D = torch.randn(3, 9), torch.randn(5, 3, 3).to(E4M3), torch.randn(4, 2, 2, 2, 2).to(E4M3)
KERNEL_T, GEOMETRY_T = torch.randn(6, 2, 3, 3).to(E4M3), ([2, 1], [1, 1], [1, 1], True, [1, 0], 2)
WIDE = torch.randn(8, 160).to(E4M3)
GEOMETRY = ([2, 1], [1, 1], [1, 1], False, [0, 0], 2)

QUERY, KEY, VALUE = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
HEADS, TOKENS = torch.rand(2, 1, 1) + 0.1, torch.rand(2, 2, 5, 1) + 0.1
UNMASKED = (None, None, 0.5, 0.0, E4M3, 448.0)
MASKED = (torch.zeros(2, 1, 3, 5), torch.randn(4), 0.5, 2.0, E4M3, 240.0)

ROUTED = (X.bfloat16(), torch.randint(0, 5, (4, 2)), torch.rand(4, 2))
EXPERTS = (torch.randn(3, 16, 6).to(E4M3), torch.randn(3, 6, 8).to(E4M3))
OF_ROWS = torch.tensor([2, 0, 7, -1])
PER_EXPERT, HALVES = torch.rand(3, 1, 1) + 0.1, torch.rand(3, 2, 1) + 0.1
EXPERT_CHANNELS = (torch.rand(3, 16, 1) + 0.1, torch.rand(3, 6, 1) + 0.1)

CALLS = {
    "cast_to": (NAMESPACE.cast_to_fp8, (X, SCALE, E4M3, 448.0)),
    "cast_to-e5m2": (NAMESPACE.cast_to_fp8, (X.bfloat16(), ROWS, E5M2, 57344.0)),
    "cast_to-transposed": (NAMESPACE.cast_to_fp8, (X.t(), SCALE, E4M3, 240.0)),
    "cast_to-transposed-per-row": (NAMESPACE.cast_to_fp8, (torch.randn(6, 4).t(), ROWS, E4M3, 240.0)),
    "cast_to-sliced": (NAMESPACE.cast_to_fp8, (X[:, ::2], SCALE, E4M3, 448.0)),
    "cast_to-empty": (NAMESPACE.cast_to_fp8, (X[:0], SCALE, E4M3, 448.0)),
    "cast_from": (NAMESPACE.cast_from_fp8, (WEIGHT, SCALE, torch.bfloat16)),
    "cast_from-per-channel": (NAMESPACE.cast_from_fp8, (KERNEL, torch.rand(6, 1, 1, 1), torch.float32)),
    "dynamic-tensor": (NAMESPACE.dynamic_scale, (X, 0, 224.0, "pow2", "E4M3", "cpu", torch.bfloat16)),
    "dynamic-token": (NAMESPACE.dynamic_scale, (X, -1, 120.0, "pow2", "E4M3", "gaudi2", torch.bfloat16)),
    "dynamic-empty": (NAMESPACE.dynamic_scale, (X[:0], -1, 224.0, "identity", "E4M3", "cpu", torch.float32)),
    "dynamic-3d": (NAMESPACE.dynamic_scale, (IMAGE[0], -1, 224.0, "hardware", "E4M3", "cpu", torch.float32)),
    "linear": (NAMESPACE.linear, (X, WEIGHT, SCALE, None, None, 448.0, "fused")),
    "linear-static": (NAMESPACE.linear, (X.half(), WEIGHT, torch.rand(8, 1), SCALE, torch.ones(8), 448.0, "qdq")),
    "linear-token": (NAMESPACE.linear, (X.bfloat16(), WEIGHT, SCALE, ROWS, torch.ones(8), 240.0, "gaudi")),
    "linear-1d": (NAMESPACE.linear, (X[0], WEIGHT, SCALE, None, None, 448.0, "fused")),
    "linear-3d": (NAMESPACE.linear, (X.reshape(2, 2, 6), WEIGHT, SCALE, SCALE, None, 448.0, "fused")),
    "linear-empty": (NAMESPACE.linear, (X[:0], WEIGHT, SCALE, SCALE, None, 448.0, "fused")),
    "linear-transposed": (NAMESPACE.linear, (torch.randn(6, 4).t(), WEIGHT, SCALE, SCALE, None, 448.0, "fused")),
    "linear-no-features": (NAMESPACE.linear, (X[:, :0], WEIGHT[:, :0], SCALE, None, None, 448.0, "fused")),
    "dynamic_linear-token": (
        NAMESPACE.dynamic_linear,
        (X.bfloat16(), WEIGHT, SCALE, torch.ones(8), -1, 224.0, "pow2", "E4M3", "cpu", torch.bfloat16, 448.0, "fused"),
    ),
    "dynamic_linear-empty": (
        NAMESPACE.dynamic_linear,
        (X[:0], WEIGHT, SCALE, None, 0, 120.0, "identity", "E4M3", "gaudi2", torch.float32, 240.0, "gaudi"),
    ),
    "linear_input_gradient": (
        NAMESPACE.linear_input_gradient,
        (torch.randn(2, 2, 8).bfloat16(), WEIGHT, torch.rand(8, 1), X.reshape(2, 2, 6), SCALE, 1.0),
    ),
    "linear_input_gradient-blocks": (
        NAMESPACE.linear_input_gradient,
        (torch.randn(8, 4).t(), WIDE, torch.rand(1, 2) + 0.1, None, None, 448.0),
    ),
    "experts": (
        NAMESPACE.experts,
        (*ROUTED, *EXPERTS, HALVES, PER_EXPERT, SCALE, PER_EXPERT, "silu", 0, 240.0, "gaudi"),
    ),
    "experts-dynamic": (
        NAMESPACE.experts,
        (*ROUTED, *EXPERTS, *EXPERT_CHANNELS, ROWS, None, "gelu", 1, 448.0, "fused"),
    ),
    "experts-transposed": (
        NAMESPACE.experts,
        (torch.randn(6, 4).t(), *ROUTED[1:], *EXPERTS, PER_EXPERT, PER_EXPERT, None, None, "relu", 0, 448.0, "qdq"),
    ),
    "grouped": (
        NAMESPACE.grouped_linear,
        (X.bfloat16(), OF_ROWS, EXPERTS[0], HALVES, PER_EXPERT, torch.ones(3, 16), 240.0, "gaudi"),
    ),
    "grouped-dynamic": (
        NAMESPACE.grouped_linear,
        (torch.randn(6, 4).t(), OF_ROWS.int(), EXPERTS[0], EXPERT_CHANNELS[0], ROWS, None, 448.0, "fused"),
    ),
    "grouped-empty": (NAMESPACE.grouped_linear, (X[:0], OF_ROWS[:0], EXPERTS[0], HALVES, None, None, 448.0, "qdq")),
    "conv": (NAMESPACE.conv, (IMAGE, KERNEL, SCALE, None, None, *GEOMETRY, 448.0, "fused")),
    "conv-qdq": (NAMESPACE.conv, (IMAGE.half(), KERNEL, SCALE, SCALE, None, *GEOMETRY, 448.0, "qdq")),
    "conv-unbatched": (
        NAMESPACE.conv,
        (IMAGE[0], KERNEL, torch.rand(6, 1, 1, 1), SCALE, torch.ones(6), *GEOMETRY, 448.0, "gaudi"),
    ),
    "conv-channels-last": (
        NAMESPACE.conv,
        (IMAGE.to(memory_format=torch.channels_last), KERNEL, SCALE, SCALE, None, *GEOMETRY, 448.0, "fused"),
    ),
    "conv-1d": (NAMESPACE.conv, (LINE, KERNEL_1D, SCALE, SCALE, None, [2], [1], [1], False, [0], 1, 448.0, "fused")),
    "conv-transposed": (
        NAMESPACE.conv,
        (IMAGE, KERNEL_T, torch.rand(6, 1, 1, 1), SCALE, torch.ones(6), *GEOMETRY_T, 448.0, "gaudi"),
    ),
    "embedding": (NAMESPACE.embedding, (torch.tensor([[3, 0], [1, 1]]), WEIGHT, SCALE, torch.bfloat16)),
    "embedding-rows": (NAMESPACE.embedding, (torch.tensor([3, 0, 7]), WEIGHT, torch.rand(8, 1), torch.float32)),
    "conv-3d": (
        NAMESPACE.conv,
        (torch.randn(1, 2, 4, 5, 4), KERNEL_3D, SCALE, None, None, *[[1] * 3] * 3, False, [0] * 3, 1, 448.0, "qdq"),
    ),
    "cast_to-groups": (NAMESPACE.cast_to_fp8, (torch.randn(2, 3, 70), torch.rand(2, 3, 3) + 0.1, E4M3, 448.0)),
    "cast_to-blocks": (NAMESPACE.cast_to_fp8, (torch.randn(130, 70), torch.rand(2, 1) + 0.1, E4M3, 448.0)),
    "cast_from-groups": (NAMESPACE.cast_from_fp8, (WIDE, torch.rand(8, 2) + 0.1, torch.bfloat16)),
    "maxabs": (NAMESPACE.maxabs, (X, 0)),
    "maxabs-rows": (NAMESPACE.maxabs, (IMAGE.bfloat16(), -1)),
    "maxabs-groups": (NAMESPACE.maxabs, (IMAGE, 2)),
    "dynamic-groups": (NAMESPACE.dynamic_scale, (X, 4, 224.0, "pow2", "E4M3", "cpu", torch.bfloat16)),
    "linear-groups": (
        NAMESPACE.linear,
        (torch.randn(4, 160), WIDE, torch.rand(8, 2) + 0.1, torch.rand(4, 5) + 0.1, None, 448.0, "fused"),
    ),
    "attention": (NAMESPACE.attention, (QUERY, KEY, VALUE, *[SCALE] * 5, *UNMASKED, "fused")),
    "attention-unrounded": (NAMESPACE.attention, (QUERY.half(), KEY, VALUE, *[None] * 5, *MASKED, "unfused")),
    "attention-heads": (NAMESPACE.attention, (QUERY, KEY, VALUE, SCALE, HEADS, HEADS, SCALE, None, *MASKED, "qdq")),
    "attention-cached": (
        NAMESPACE.attention,
        (QUERY.bfloat16(), KEY.to(E4M3), VALUE.to(E4M3), SCALE, TOKENS, TOKENS, SCALE, SCALE, *MASKED, "fused"),
    ),
    "attention_weights": (
        NAMESPACE.attention_weights,
        (QUERY.bfloat16(), KEY.to(E4M3), SCALE, TOKENS, SCALE, *MASKED, "unfused"),
    ),
    "softmax": (NAMESPACE.softmax, (X.bfloat16(), SCALE, SCALE, 0, E4M3, 448.0)),
    "matmul": (NAMESPACE.matmul, (QUERY, KEY.repeat(1, 2, 1, 1).mT, SCALE, SCALE, E4M3, 448.0, "fused")),
    "matmul-qdq": (NAMESPACE.matmul, (X.bfloat16(), WEIGHT.t(), SCALE, SCALE, E4M3, 448.0, "qdq")),
}
EACH_CALL = over(name=CALLS)


def is_fp8(value):
    return torch.is_tensor(value) and value.dtype in (E4M3, E5M2)


def linear(x, bias=None, arithmetic="fused"):
    return ops.linear(x, WEIGHT, SCALE, SCALE, bias, full_scale=448.0, arithmetic=arithmetic)


def test_every_operator_is_called_here():
    assert {op.__name__ for op, _ in CALLS.values()} == {
        "cast_to_fp8",
        "cast_from_fp8",
        "maxabs",
        "dynamic_scale",
        "linear",
        "dynamic_linear",
        "linear_input_gradient",
        "conv",
        "embedding",
        "attention",
        "attention_weights",
        "matmul",
        "softmax",
        "experts",
        "grouped_linear",
    }


@pytest.mark.slow
@pytest.mark.core
@EACH_CALL
def test_opcheck(name):
    op, args = CALLS[name]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(is_fp8(arg) for arg in args):
        utils.remove("test_schema")  # calls torch.allclose on the inputs, which has no FP8: see the next test instead
    torch.library.opcheck(op, args, test_utils=utils)


@EACH_CALL
def test_inputs_are_left_alone(name):
    op, args = CALLS[name]
    tensors = [arg.view(torch.uint8) if is_fp8(arg) else arg for arg in args if torch.is_tensor(arg)]
    before = [tensor.clone() for tensor in tensors]
    result = op(*args)
    assert all(map(torch.equal, before, tensors))
    assert result.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors} - {0}


@EACH_CALL
def test_fake_tensors_have_the_real_shape(name):
    op, args = CALLS[name]
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*[mode.from_tensor(arg) if torch.is_tensor(arg) else arg for arg in args])
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


@EACH_CALL
def test_meta_tensors_are_enough(name):
    op, args = CALLS[name]
    meta = op(*[arg.to("meta") if torch.is_tensor(arg) else arg for arg in args])
    assert meta.device.type == "meta" and meta.shape == op(*args).shape


BY_RANGE = (NAMESPACE.cast_to_fp8_by_range, (X, torch.rand(1 << 15), True, E4M3, 448.0))
MIXABLE = {
    name: (op, args)
    for name, (op, args) in {**CALLS, "by_range": BY_RANGE}.items()
    if sum(map(torch.is_tensor, args)) > 1
}


@pytest.mark.core
@over(name=MIXABLE)
def test_tensors_with_and_without_values_are_refused_by_name(name):
    op, args = MIXABLE[name]
    places = [place for place, arg in enumerate(args) if torch.is_tensor(arg)]
    for absent in [*((place,) for place in places), *itertools.islice(itertools.combinations(places, 2), 3)]:
        if len(absent) == len(places):
            continue
        mixed = [arg.to("meta") if place in absent else arg for place, arg in enumerate(args)]
        names = ", ".join(op.default._schema.arguments[place].name for place in absent)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), pytest.raises(FP8OperandError, match=f"{op.__name__}: {names} on the device meta"):
                op(*mixed)


def test_meta_tensors_are_enough_for_the_functions():
    x, weight, scale = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in (((3, 8), torch.bfloat16), ((4, 8), torch.float8_e4m3fn), ((1,), torch.float32))
    )
    assert ops.maxabs(x, group=-1).shape == (3, 1)
    assert ops.linear(x, weight, scale, None, None, full_scale=448.0).shape == (3, 4)


def test_operators_with_several_results():
    x = torch.randn(3, 8)
    utils = ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.optimum_fp8.maxabs, (x, -1), test_utils=utils)
    scales = torch.rand(1 << 15)
    for per_row, transposed in itertools.product((False, True), repeat=2):
        arguments = (x.t() if transposed else x, scales, per_row, torch.float8_e4m3fn, 448.0)
        torch.library.opcheck(torch.ops.optimum_fp8.cast_to_fp8_by_range, arguments, test_utils=utils)


def test_every_operator_is_documented():
    assert all(getattr(ops, op.__name__).__doc__ for op, _ in CALLS.values())


def test_token_of_no_dimension_has_the_shape_that_the_fake_kernel_says():
    args = (torch.tensor(-0.5), -1, 224.0, "pow2", "E4M3", "cpu", torch.float32)
    with FakeTensorMode() as mode:
        fake = NAMESPACE.dynamic_scale(mode.from_tensor(args[0]), *args[1:])
    assert NAMESPACE.dynamic_scale(*args).shape == fake.shape


@pytest.mark.core
@over(dynamic=[False, True], arithmetic=ops.ARITHMETICS)
def test_compile(arithmetic, dynamic):
    torch._dynamo.reset()

    def block(x, bias):
        return torch.nn.functional.gelu(linear(x, bias, arithmetic)) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        x, bias = torch.randn(rows, 6).bfloat16(), torch.randn(8).bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(x, bias), block(x, bias))


def test_compile_of_a_dynamic_quantization():
    torch._dynamo.reset()

    def block(x):
        scale = ops.dynamic_scale(
            x,
            group=-1,
            divisor=224.0,
            rounding="pow2",
            fp8_config="E4M3",
            target="cpu",
            hp_dtype=torch.bfloat16,
        )
        return ops.cast_from_fp8(ops.cast_to_fp8(x, scale, E4M3, 448.0), scale, x.dtype)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), block(X))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()

    def block(x, bias):
        return torch.relu(linear(x, bias)) + 1

    bias = torch.randn(8)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(X, bias), block(X, bias))


def test_calls_are_counted_under_compile():
    torch._dynamo.reset()
    record = ops.CallRecord()
    record.watch(WEIGHT)

    def block(x):
        return ops.linear(x, WEIGHT, SCALE, None, None, full_scale=448.0, record=record)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(X)
    assert record.kernels["linear", ops.cpu.backends()[0]] == 3


def test_backward_says_what_to_do():
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(FP8NotAvailableError, match="no gradient through optimum_fp8::maxabs.*dequantize"):
        ops.maxabs(x).sum().backward()


def test_backward_through_a_cast_says_what_to_do():
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(FP8NotAvailableError, match="no gradient through optimum_fp8::cast_"):
        ops.cast_from_fp8(ops.cast_to_fp8(x, SCALE, E4M3, 448.0), SCALE, x.dtype).sum().backward()


@pytest.mark.filterwarnings("error")
@over(mode=[torch.no_grad, torch.inference_mode])
def test_inference_is_silent(mode):
    x = torch.randn(2, 6, requires_grad=True)
    with mode():
        assert not linear(x).requires_grad


@pytest.mark.filterwarnings("error")
def test_forward_with_gradients_on_is_silent():
    assert linear(torch.randn(2, 6, requires_grad=True)).shape == (2, 8)
