"""`emulated` itself: what is there inside and not afterwards, fake tensors and compilation, torch's own checks."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from optimum_fp8.errors import FP8ConfigError, FP8StateError
from optimum_fp8.test_utils import gaudi
from optimum_fp8.test_utils.gaudi.schemas import SCHEMAS

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
X, CODES, WEIGHT = torch.randn(4, 8), torch.randn(4, 8).to(E4M3), torch.randn(8, 6).to(E4M3)
ONE, NONE = torch.ones(1), [None] * 6
IMAGE, KERNEL = torch.randn(1, 2, 5, 5).to(E4M3), torch.randn(3, 2, 3, 3).to(E4M3)
Q = torch.randn(2, 3, 4, 8)
CACHE, INDEX = torch.randn(2, 4, 6, 5), torch.tensor([0, 1])
ROUTED = (X, torch.tensor([[0, 1]] * 4), torch.rand(4, 2))
ROUTED_CODES = (CODES, *ROUTED[1:])
W12, W3 = [torch.randn(8, 12)] * 2, [torch.randn(6, 8)] * 2
W12_CODES, W3_CODES = [w.to(E4M3) for w in W12], [w.to(E4M3) for w in W3]
EXPERTS, ONES = (False, "silu", 0, 1), [ONE, ONE]
BIASED = {"permuted_weights": False, "experts_min": 0, "experts_max": 1}
BIASES = ([torch.randn(12)] * 2, [torch.randn(8)] * 2)
SDPA_END = (None, "left", [-1, -1], None)

CALLS = {
    "cast_to_fp8_v2.default": ((X, ONE, False, True, E4M3), {}),
    "cast_to_fp8_v2.scalar": ((X, 2.0, False, False, E5M2), {}),
    "cast_to_fp8_v2.scalar_list": ((X, [1.0, 2.0, 3.0, 4.0], False, False, E4M3, [4, 1]), {}),
    "cast_to_fp8_hybrid.default": ((X, ONE, ONE, False, True), {}),
    "cast_from_fp8.default": ((CODES, ONE, BF16), {}),
    "cast_from_fp8.scalar": ((CODES, 2.0, torch.float32), {}),
    "cast_from_fp8.scalar_list": ((CODES, [2.0], BF16), {}),
    "fp8_gemm_v2.default": ((CODES, False, WEIGHT, False, X[:, :6], BF16, ONE, torch.ones(6), X[0, :6], True), {}),
    "fp8_gemm_v2.scalar": ((CODES, True, CODES, False, None, torch.float32, 2.0, 0.5), {}),
    "fp8_gemm_v2.scalar_list": ((CODES, False, WEIGHT, False, None, BF16, [2.0], [0.5]), {}),
    "conv2d_fp8.default": ((IMAGE, KERNEL, torch.randn(3), [2, 1], [1, 0]), {"scale_input": ONE}),
    "conv2d_fp8.scalar": ((IMAGE, KERNEL), {"scale_input": 2.0}),
    "softmax_fp8.default": ((X.to(BF16), -1), {}),
    "softmax_fp8.Scalar_scales": ((CODES, -1, 1.0, 16.0), {}),
    "softmax_fp8.Scalar": ((CODES, -1, 1.0, 16.0, 0.5), {}),
    "sum_fp8.default": ((CODES, [1], True), {}),
    "calculate_scale_for_cast.default": ((X, 2, 1, -1, True, 240.0, 0.5), {}),
    "cast_to_fp8_just_in_time.default": ((X, [1, 4]), {"scale_dtype": BF16}),
    "kv_reorder.default": ((CACHE, INDEX, INDEX + 3, INDEX.to(torch.uint8)), {}),
    "in_place_interleave.default": ((torch.randn(4, 2, 3, 5),), {}),
    "sdpa_recomp_fwd.default": ((Q, Q, Q, None, 0.0, 1.0, True, True, "none", *SDPA_END), {}),
    "fp8_sdpa_recomp_fwd.default": (
        (*[Q.to(E4M3)] * 3, None, 0.0, 1.0, False, True, "none", *[ONE] * 6, True, True, *SDPA_END),
        {},
    ),
    "fp8_sdpa_recomp_fwd.scalar": (
        (*[Q.to(E5M2)] * 3, None, 0.0, 1.0, True, False, "none", *[1.0] * 6, False, False, *SDPA_END),
        {},
    ),
    "fp8_sdpa_fwd.default": ((*[Q.to(E4M3)] * 3, None, 0.0, 1.0, True, "none", *NONE, True, None, "left"), {}),
    "mixture_of_experts.default": ((*ROUTED, [w[:, :6] for w in W12], [w[:, 6:] for w in W12], W3, *EXPERTS), {}),
    "mixture_of_experts.fused_weights": ((*ROUTED, W12, W3, *EXPERTS), {}),
    "mixture_of_experts.fp8_measurement": (
        (*ROUTED, [w[:, :6] for w in W12], [w[:, 6:] for w in W12], W3, *EXPERTS, True),
        {},
    ),
    "mixture_of_experts.fp8_measurement_fused_weights": ((*ROUTED, W12, W3, *EXPERTS, True), {}),
    "mixture_of_experts.fp8_fused_weights": (
        (*ROUTED_CODES, W12_CODES, W3_CODES, ONE, ONES, ONES, ONES, *EXPERTS),
        {},
    ),
    "mixture_of_experts.fp8_fused_weights_scalars": (
        (*ROUTED_CODES, W12_CODES, W3_CODES, 1.0, [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], *EXPERTS),
        {},
    ),
    "mixture_of_experts.fp8_fused_weights_dynamic": (
        (*ROUTED_CODES, W12_CODES, W3_CODES, torch.ones(4), ONES, ONES, *EXPERTS),
        {},
    ),
    "mixture_of_experts.fp8_fused_weights_blockwise": (
        (*ROUTED, W12_CODES, W3_CODES, [torch.ones(2, 3)] * 2, [torch.ones(2, 2)] * 2, 4, *EXPERTS),
        {},
    ),
    "mixture_of_experts.measurement_bias_fused_weights": (
        (*ROUTED, W12, W3, *BIASES),
        BIASED | {"measure_per_token": True},
    ),
    "mixture_of_experts.bias_fp8_fused_weights": (
        (*ROUTED_CODES, W12_CODES, W3_CODES, *BIASES, ONE, ONES, ONES, ONES),
        BIASED,
    ),
}
IN_PLACE = {"kv_reorder_", "in_place_interleave_", "fp8_gemm"}


def overload(name):
    packet, _, which = name.partition(".")
    return getattr(getattr(torch.ops.hpu, packet), which)


def tensors(result):
    return [result] if torch.is_tensor(result) else list(result)


def test_every_operator_is_called_here(gaudi2):
    packets = {name.partition(".")[0] for name in CALLS}
    assert packets | IN_PLACE == {schema.partition("(")[0].partition(".")[0] for schema in SCHEMAS["1.24"]}


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_have_the_shapes_and_dtypes_of_the_real(gaudi2, name):
    args, kwargs = CALLS[name]
    real = tensors(overload(name)(*args, **kwargs))
    with FakeTensorMode() as mode:
        fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        fake_kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, kwargs)
        fake = tensors(overload(name)(*fake_args, **fake_kwargs))
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]
    assert len(gaudi2.calls) == 1


@pytest.mark.core
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(gaudi2, name):
    args, kwargs = CALLS[name]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(x.dtype in (E4M3, E5M2) for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)):
        utils.remove("test_schema")  # calls torch.allclose on the inputs, which has no FP8
    torch.library.opcheck(overload(name), args, kwargs, test_utils=utils)


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_left_alone(gaudi2, name):
    args, kwargs = CALLS[name]
    given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
    given = [x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in given]
    before = [x.clone() for x in given]
    result = tensors(overload(name)(*args, **kwargs))
    assert all(map(torch.equal, before, given))
    assert not {x.untyped_storage().data_ptr() for x in result if x.numel()} & {
        x.untyped_storage().data_ptr() for x in given
    }


def linear(x, weight):
    codes = torch.ops.hpu.cast_to_fp8_v2(x, 16.0, False, False, E4M3)[0]
    return torch.ops.hpu.fp8_gemm_v2(codes, False, weight, False, None, BF16, 0.0625, 1.0) + 1


@pytest.mark.core
def test_compiled_code_calls_the_operators(device):
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 8)
        expected = linear(x, WEIGHT)
        device.calls.clear()
        assert torch.equal(compiled(x, WEIGHT), expected)
        assert [call.name for call in device.calls] == ["cast_to_fp8_v2", "fp8_gemm_v2"]


def test_moves_in_place_under_compilation(gaudi2):
    torch._dynamo.reset()

    def twice(x):
        torch.ops.hpu.in_place_interleave_(x)
        return x * 2

    x = torch.randn(4, 1, 1, 3)
    expected = x[:1].expand(4, 1, 1, 3) * 2
    assert torch.equal(torch.compile(twice, backend="aot_eager", fullgraph=True)(x.clone()), expected)


def test_strided_tensors_are_taken(gaudi2):
    args = (False, WEIGHT, False, None, BF16, 1.0, 1.0)
    apart = torch.randn(8, 4).to(E4M3)
    assert torch.equal(
        torch.ops.hpu.fp8_gemm_v2(apart.t(), *args), torch.ops.hpu.fp8_gemm_v2(apart.t().contiguous(), *args)
    )
    out = torch.ops.hpu.cast_to_fp8_v2(X.t(), ONE, False, False, E4M3)[0]
    assert out.is_contiguous() and out.shape == (8, 4)


def modules():
    return {name for name in sys.modules if name.partition(".")[0] == "habana_frameworks"}


@pytest.mark.core
def test_nothing_is_left_afterwards():
    for _ in range(3):
        before = set(sys.modules)
        with gaudi.emulated("gaudi2"):
            assert modules() and torch.ops.hpu.cast_to_fp8_v2(X, None, False, False, E4M3)[0].dtype == E4M3
            assert importlib.util.find_spec("habana_frameworks.torch") is not None
        assert not modules() and set(sys.modules) - before == set()
        assert importlib.util.find_spec("habana_frameworks") is None
        assert not hasattr(torch.ops.hpu, "cast_to_fp8_v2") and not hasattr(torch, "hpu")
        with pytest.raises((RuntimeError, AttributeError)):
            torch.ops.hpu.cast_to_fp8_v2(X, None, False, False, E4M3)


def test_nothing_is_left_after_an_error():
    with pytest.raises(ZeroDivisionError), gaudi.emulated("gaudi2"):
        raise ZeroDivisionError
    assert not modules() and not hasattr(torch.ops.hpu, "fp8_gemm_v2")


def test_one_device_at_a_time(gaudi2):
    with pytest.raises(FP8StateError, match="habana_frameworks is there already"), gaudi.emulated("gaudi3"):
        pass
    assert hasattr(torch.ops.hpu, "fp8_gemm_v2")


@pytest.mark.parametrize(
    "chip, kwargs, message",
    [("gaudi1", {}, "did you mean 'gaudi"), ("gaudi2", {"bridge": "1.20"}, "bridge='1.20' is unknown")],
)
def test_unknown_devices(chip, kwargs, message):
    with pytest.raises(FP8ConfigError, match=message), gaudi.emulated(chip, **kwargs):
        pass


def test_the_default_device_does_not_matter(gaudi2):
    with torch.device("meta"):
        out = torch.ops.hpu.fp8_gemm_v2(CODES, False, WEIGHT, False, None, BF16, ONE, None)
    assert out.device.type == "cpu"


def test_importing_the_package_does_not_import_the_emulator():
    script = "import optimum_fp8, sys; print([name for name in sys.modules if 'test_utils' in name])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_emulator_uses_nothing_of_what_it_is_an_oracle_for():
    folder = importlib.import_module("pathlib").Path(gaudi.__file__).parent
    for path in folder.glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("from ...", "import optimum"))]
        assert all(line.startswith("from ...errors import") for line in lines), path
