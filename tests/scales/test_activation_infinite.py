"""Dynamic scales of tensors that hold NaN or Inf: these do not count, and what shares a scale with them keeps its."""

import itertools

import pytest
import torch
from grids import over
from native_variants import OF_CASTS
from scale_methods import FOR_ANY_SHAPE
from tiny_models import tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, convert, ops
from optimum_fp8.cache.scales import CacheScales
from optimum_fp8.formats import number_format
from optimum_fp8.scales import inf_as_nan, unsound

E4M3 = torch.float8_e4m3fn
HIGH = [torch.float32, torch.bfloat16, torch.float16]
BAD = [torch.inf, -torch.inf, torch.nan]
DYNAMIC = [name for name, method in FOR_ANY_SHAPE.items() if method.activation.needs_range]
BACKENDS = [*OF_CASTS, "reference"]


def scale_of(x, group, rounding, target, hp_dtype):
    options = {"divisor": 224.0, "rounding": rounding, "fp8_config": "E4M3", "target": target, "hp_dtype": hp_dtype}
    return ops.dynamic_scale(x, group=group, **options)


@over(backend=BACKENDS, dtype=HIGH)
def test_the_scale_is_that_of_the_finite_values(backend, dtype):
    x = torch.randn(5, 96).to(dtype) * 30
    for at, bad, group, rounding in itertools.product((0, 95), BAD, (0, -1, 32), ("identity", "pow2", "hardware")):
        bads, zeros = x.clone(), x.clone()
        bads[2, at], zeros[2, at] = bad, 0
        with ops.backend(backend):
            for target in ("cpu", "gaudi2"):
                found = scale_of(bads, group, rounding, target, torch.bfloat16)
                assert torch.equal(found, scale_of(zeros, group, rounding, target, torch.bfloat16))


@over(backend=BACKENDS, dtype=HIGH, bad=BAD)
def test_a_tensor_of_nothing_else_has_a_sound_scale(backend, dtype, bad):
    x = torch.full((3, 20000), bad).to(dtype)
    with ops.backend(backend):
        for group in (0, -1, 32):
            for target in ("cpu", "gaudi2"):
                assert unsound(scale_of(x, group, "hardware", target, dtype)) is None
                assert unsound(scale_of(x, group, "identity", target, torch.bfloat16)) is None


def test_the_range_for_calibration_keeps_what_is_not_finite():
    x = torch.ones(3, 40)
    x[1, 3] = torch.inf
    assert ops.maxabs(x).item() == torch.inf
    x[1, 4] = torch.nan
    assert ops.maxabs(x).isnan()


@over(dtype=HIGH)
def test_inf_becomes_nan_and_nothing_else_changes(dtype):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40, 65504.0, -3.0]).to(dtype)
    found = inf_as_nan(x)
    assert found[:3].isnan().all()
    assert torch.equal(found[3:].view(torch.uint8), x[3:].view(torch.uint8))


@pytest.mark.core
@over(dtype=HIGH, bad=BAD, method=DYNAMIC)
def test_a_bad_row_leaves_the_others_of_a_linear_layer_alone(method, bad, dtype):
    plain = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    config = FP8Config(activation_scheme="dynamic", scale_method=method, quantize_lm_head=True)
    x = torch.randn(6, 64).to(dtype) * 20
    expected = plain(x).detach()
    module, others = convert(plain, config), [0, 1, 3, 4, 5]
    x[2, 5] = bad
    found = module(x)
    assert not found[2].isfinite().any()
    assert (found - expected)[others].norm() < 0.06 * expected[others].norm()
    assert module(torch.full_like(x, bad)).isnan().all()


def test_a_compiled_layer_does_the_same():
    torch._dynamo.reset()
    config = FP8Config(activation_scheme="dynamic", scale_method="maxabs_pow2", quantize_lm_head=True)
    module = convert(nn.Sequential(nn.Linear(64, 32)).bfloat16(), config)
    x = torch.randn(6, 64).bfloat16()
    x[2, 5], x[4, 6] = torch.inf, torch.nan
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x).nan_to_num(7.0), module(x).nan_to_num(7.0))
        assert compiled(x).isnan().all(-1).tolist() == [False, False, True, False, True, False]


@over(bad=BAD)
def test_a_bad_image_leaves_the_others_of_a_convolution_alone(bad):
    plain = nn.Sequential(nn.Conv2d(4, 8, 3))
    x = torch.randn(3, 4, 7, 7) * 10
    expected = plain(x).detach()
    module = convert(plain, FP8Config(activation_scheme="dynamic", quantize_lm_head=True))
    x[1, :, 3, 3] = bad
    found = module(x)
    assert found[1].isnan()[:, 1:4, 1:4].all()
    for image in (0, 2):
        assert (found - expected)[image].norm() < 0.06 * expected[image].norm()


@over(bad=BAD)
def test_a_bad_token_stays_bad_in_the_cache(bad):
    scales, x = CacheScales(number_format("E4M3", "cpu")), torch.randn(1, 2, 5, 16)
    x[0, 1, 3, 2] = bad
    codes, scale = scales.quantize(x, None)
    back = ops.cast_from_fp8(codes, scale, torch.float32)
    assert unsound(scale) is None and back.isnan().nonzero().tolist() == [[0, 1, 3, 2]]
    x[0, 1, 3, 2] = back[0, 1, 3, 2] = 0
    assert (back - x).norm() < 0.05 * x.norm()


@over(bad=BAD)
def test_a_bad_sequence_leaves_the_others_of_a_model_alone(bad):
    config = FP8Config(activation_scheme="dynamic", attention=True, kv_cache=True)
    model = convert(tiny_llama().eval(), config)
    x = torch.randn(2, 5, model.config.hidden_size)
    with torch.no_grad():
        before = model(inputs_embeds=x).logits
        x[1, 2, 3] = bad
        after = model(inputs_embeds=x).logits
    assert torch.equal(after[0], before[0])
    assert after[1, 2:].isnan().all()
