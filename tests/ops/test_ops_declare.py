"""The operators as torch sees them: schema, fake kernels, torch.compile, and no gradient."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NAMESPACE = torch.ops.optimum_fp8
X = torch.randn(4, 6)
SCALE = torch.tensor([0.5])
WEIGHT = torch.randn(8, 6).to(E4M3)
IMAGE = torch.randn(2, 4, 7, 5)
KERNEL = torch.randn(6, 2, 3, 3).to(E4M3)
ROWS = torch.rand(4, 1) + 0.1
GEOMETRY = ([2, 1], [1, 1], [1, 1], 2)

QUERY, KEY, VALUE = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
HEADS, TOKENS = torch.rand(2, 1, 1) + 0.1, torch.rand(2, 2, 5, 1) + 0.1
UNMASKED = (None, None, 0.5, 0.0, E4M3, 448.0)
MASKED = (torch.zeros(2, 1, 3, 5), torch.randn(4), 0.5, 2.0, E4M3, 240.0)

CALLS = {
    "cast_to": (NAMESPACE.cast_to_fp8, (X, SCALE, E4M3, 448.0)),
    "cast_to-e5m2": (NAMESPACE.cast_to_fp8, (X.bfloat16(), ROWS, E5M2, 57344.0)),
    "cast_to-transposed": (NAMESPACE.cast_to_fp8, (X.t(), SCALE, E4M3, 240.0)),
    "cast_to-transposed-per-row": (NAMESPACE.cast_to_fp8, (torch.randn(6, 4).t(), ROWS, E4M3, 240.0)),
    "cast_to-sliced": (NAMESPACE.cast_to_fp8, (X[:, ::2], SCALE, E4M3, 448.0)),
    "cast_to-empty": (NAMESPACE.cast_to_fp8, (X[:0], SCALE, E4M3, 448.0)),
    "cast_from": (NAMESPACE.cast_from_fp8, (WEIGHT, SCALE, torch.bfloat16)),
    "cast_from-per-channel": (NAMESPACE.cast_from_fp8, (KERNEL, torch.rand(6, 1, 1, 1), torch.float32)),
    "dynamic-tensor": (NAMESPACE.dynamic_scale, (X, False, 224.0, "pow2", "E4M3", "cpu", torch.bfloat16)),
    "dynamic-token": (NAMESPACE.dynamic_scale, (X, True, 120.0, "pow2", "E4M3", "gaudi2", torch.bfloat16)),
    "dynamic-empty": (NAMESPACE.dynamic_scale, (X[:0], True, 224.0, "identity", "E4M3", "cpu", torch.float32)),
    "dynamic-3d": (NAMESPACE.dynamic_scale, (IMAGE[0], True, 224.0, "hardware", "E4M3", "cpu", torch.float32)),
    "linear": (NAMESPACE.linear, (X, WEIGHT, SCALE, None, None, 448.0, "fused", 0)),
    "linear-static": (NAMESPACE.linear, (X.half(), WEIGHT, torch.rand(8, 1), SCALE, torch.ones(8), 448.0, "qdq", 0)),
    "linear-token": (NAMESPACE.linear, (X.bfloat16(), WEIGHT, SCALE, ROWS, torch.ones(8), 240.0, "gaudi", 0)),
    "linear-1d": (NAMESPACE.linear, (X[0], WEIGHT, SCALE, None, None, 448.0, "fused", 0)),
    "linear-3d": (NAMESPACE.linear, (X.reshape(2, 2, 6), WEIGHT, SCALE, SCALE, None, 448.0, "fused", 0)),
    "linear-empty": (NAMESPACE.linear, (X[:0], WEIGHT, SCALE, SCALE, None, 448.0, "fused", 0)),
    "linear-transposed": (NAMESPACE.linear, (torch.randn(6, 4).t(), WEIGHT, SCALE, SCALE, None, 448.0, "fused", 0)),
    "linear-no-features": (NAMESPACE.linear, (X[:, :0], WEIGHT[:, :0], SCALE, None, None, 448.0, "fused", 0)),
    "conv2d": (NAMESPACE.conv2d, (IMAGE, KERNEL, SCALE, None, None, *GEOMETRY, 448.0, "fused", 0)),
    "conv2d-qdq": (NAMESPACE.conv2d, (IMAGE.half(), KERNEL, SCALE, SCALE, None, *GEOMETRY, 448.0, "qdq", 0)),
    "conv2d-unbatched": (
        NAMESPACE.conv2d,
        (IMAGE[0], KERNEL, torch.rand(6, 1, 1, 1), SCALE, torch.ones(6), *GEOMETRY, 448.0, "gaudi", 0),
    ),
    "conv2d-channels-last": (
        NAMESPACE.conv2d,
        (IMAGE.to(memory_format=torch.channels_last), KERNEL, SCALE, SCALE, None, *GEOMETRY, 448.0, "fused", 0),
    ),
    "attention": (NAMESPACE.attention, (QUERY, KEY, VALUE, *[SCALE] * 5, *UNMASKED, "fused", 0)),
    "attention-unrounded": (NAMESPACE.attention, (QUERY.half(), KEY, VALUE, *[None] * 5, *MASKED, "unfused", 0)),
    "attention-heads": (NAMESPACE.attention, (QUERY, KEY, VALUE, SCALE, HEADS, HEADS, SCALE, None, *MASKED, "qdq", 0)),
    "attention-cached": (
        NAMESPACE.attention,
        (QUERY.bfloat16(), KEY.to(E4M3), VALUE.to(E4M3), SCALE, TOKENS, TOKENS, SCALE, SCALE, *MASKED, "fused", 0),
    ),
    "attention_weights": (
        NAMESPACE.attention_weights,
        (QUERY.bfloat16(), KEY.to(E4M3), SCALE, TOKENS, SCALE, *MASKED, "unfused", 0),
    ),
    "matmul": (NAMESPACE.matmul, (QUERY, KEY.repeat(1, 2, 1, 1).mT, SCALE, SCALE, E4M3, 448.0, "fused", 0)),
    "matmul-qdq": (NAMESPACE.matmul, (X.bfloat16(), WEIGHT.t(), SCALE, SCALE, E4M3, 448.0, "qdq", 0)),
}
EACH_CALL = pytest.mark.parametrize("op, args", CALLS.values(), ids=CALLS)


def is_fp8(value):
    return torch.is_tensor(value) and value.dtype in (E4M3, E5M2)


def linear(x, bias=None, arithmetic="fused"):
    return ops.linear(x, WEIGHT, SCALE, SCALE, bias, full_scale=448.0, arithmetic=arithmetic)


def test_every_operator_is_called_here():
    assert {op.__name__ for op, _ in CALLS.values()} == {
        "cast_to_fp8",
        "cast_from_fp8",
        "dynamic_scale",
        "linear",
        "conv2d",
        "attention",
        "attention_weights",
        "matmul",
    }


@pytest.mark.core
@EACH_CALL
def test_opcheck(op, args):
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(is_fp8(arg) for arg in args):
        utils.remove("test_schema")  # calls torch.allclose on the inputs, which has no FP8: see the next test instead
    torch.library.opcheck(op, args, test_utils=utils)


@EACH_CALL
def test_inputs_are_left_alone(op, args):
    tensors = [arg.view(torch.uint8) if is_fp8(arg) else arg for arg in args if torch.is_tensor(arg)]
    before = [tensor.clone() for tensor in tensors]
    result = op(*args)
    assert all(map(torch.equal, before, tensors))
    assert result.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors} - {0}


@EACH_CALL
def test_fake_tensors_have_the_real_shape(op, args):
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*[mode.from_tensor(arg) if torch.is_tensor(arg) else arg for arg in args])
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


@EACH_CALL
def test_meta_tensors_are_enough(op, args):
    meta = op(*[arg.to("meta") if torch.is_tensor(arg) else arg for arg in args])
    assert meta.device.type == "meta" and meta.shape == op(*args).shape


def test_meta_tensors_are_enough_for_the_functions():
    x, weight, scale = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape, dtype in (((3, 8), torch.bfloat16), ((4, 8), torch.float8_e4m3fn), ((1,), torch.float32))
    )
    assert ops.maxabs(x, per_token=True).shape == (3, 1)
    assert ops.linear(x, weight, scale, None, None, full_scale=448.0).shape == (3, 4)
    assert [
        y.shape
        for y in ops.linears(x, [weight] * 2, [scale] * 2, [None] * 2, [None] * 2, full_scale=448.0, owners=[0, 0])
    ] == [(3, 4)] * 2


@pytest.mark.parametrize("gradient", [False, True])
def test_only_gradients_take_the_way_through_torchs_autograd_kernel(gradient):
    x, files = torch.randn(3, 8, requires_grad=gradient), set()
    sys.setprofile(lambda frame, *event: files.add(Path(frame.f_code.co_filename).parts[-2:]))
    try:
        torch.ops.optimum_fp8.maxabs(x, False)
    finally:
        sys.setprofile(None)
    assert ("ops", "dispatch.py") in files
    assert (("_library", "autograd.py") in files) == gradient


def test_operators_with_several_results():
    x, scale = torch.randn(3, 8), torch.ones(1)
    weights = [torch.randn(size, 8).to(torch.float8_e4m3fn) for size in (4, 6)]
    utils = ["test_faketensor", "test_aot_dispatch_dynamic"]
    linears = torch.ops.optimum_fp8.linears
    torch.library.opcheck(
        linears, (x, weights, [scale] * 2, [None] * 2, [None] * 2, 448.0, "fused", [0, 0]), test_utils=utils
    )
    cast = torch.ops.optimum_fp8.cast_to_fp8_with_maxabs
    torch.library.opcheck(cast, (x, scale, torch.float8_e4m3fn, 448.0), test_utils=utils)
    torch.library.opcheck(torch.ops.optimum_fp8.maxabs, (x, True), test_utils=utils)
    scales = torch.rand(1 << 15)
    for per_row, transposed in itertools.product((False, True), repeat=2):
        arguments = (x.t() if transposed else x, scales, per_row, torch.float8_e4m3fn, 448.0)
        torch.library.opcheck(torch.ops.optimum_fp8.cast_to_fp8_by_range, arguments, test_utils=utils)


def test_linears_are_linear_for_each_weight():
    x, biases = torch.randn(3, 8).bfloat16(), [torch.randn(4), None]
    weights = [torch.randn(size, 8).to(torch.float8_e4m3fn) for size in (4, 6)]
    scales, inputs = [torch.rand(4, 1), torch.rand(1)], [torch.tensor([0.25]), torch.tensor([0.5])]
    for backend, arithmetic in itertools.product(ops.backends(), ops.ARITHMETICS):
        options = {"full_scale": 448.0, "arithmetic": arithmetic}
        with ops.backend(backend):
            together = ops.linears(x, weights, scales, inputs, biases, owners=[0, 0], **options)
            each = zip(weights, scales, inputs, biases, strict=True)
            apart = [ops.linear(x, *one, **options) for one in each]
        assert all(map(torch.equal, together, apart)), (backend, arithmetic)


def test_every_operator_is_documented():
    assert all(getattr(ops, op.__name__).__doc__ for op, _ in CALLS.values())


def test_token_of_no_dimension_has_the_shape_that_the_fake_kernel_says():
    args = (torch.tensor(-0.5), True, 224.0, "pow2", "E4M3", "cpu", torch.float32)
    with FakeTensorMode() as mode:
        fake = NAMESPACE.dynamic_scale(mode.from_tensor(args[0]), *args[1:])
    assert NAMESPACE.dynamic_scale(*args).shape == fake.shape


@pytest.mark.core
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("arithmetic", ops.ARITHMETICS)
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
            per_token=True,
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
    owner = ops.new_owner()

    def block(x):
        return ops.linear(x, WEIGHT, SCALE, None, None, full_scale=448.0, owner=owner)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(X)
    assert ops.calls(owner).kernels["linear", ops.cpu.backends()[0]] == 3


def test_backward_says_what_to_do():
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(FP8NotAvailableError, match="no gradient through optimum_fp8::linear.*dequantize"):
        linear(x).sum().backward()


def test_backward_through_a_cast_says_what_to_do():
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(FP8NotAvailableError, match="no gradient through optimum_fp8::cast_"):
        ops.cast_from_fp8(ops.cast_to_fp8(x, SCALE, E4M3, 448.0), SCALE, x.dtype).sum().backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_is_silent(mode):
    x = torch.randn(2, 6, requires_grad=True)
    with mode():
        assert not linear(x).requires_grad


@pytest.mark.filterwarnings("error")
def test_forward_with_gradients_on_is_silent():
    assert linear(torch.randn(2, 6, requires_grad=True)).shape == (2, 8)
