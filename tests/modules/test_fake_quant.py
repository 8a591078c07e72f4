"""Fake quantization: values against ml_dtypes, gradients against the straight-through formula in float64, histories."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8ScaleError
from optimum_fp8.formats import number_format
from optimum_fp8.modules.fake_quant import Delay, FakeQuant, fake_quantize
from optimum_fp8.selection import scheme_for

FORMATS = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}


def on_grid(x, scale, fmt):
    """x / scale saturated and cast by ml_dtypes, times scale: float32, each value with its own scale."""
    codes = np.clip(x.numpy() * (np.float32(1) / scale.numpy()), -fmt.full_scale, fmt.full_scale)
    return torch.from_numpy(codes.astype(np.float32).astype(FORMATS[fmt.name]).astype(np.float32) * scale.numpy())


@pytest.mark.core
@pytest.mark.parametrize("name, target", [("E4M3", "cpu"), ("E4M3", "gaudi2"), ("E5M2", "cpu")])
@pytest.mark.parametrize("shape", [(1,), (6, 1), (1, 2), (6, 8)], ids=["tensor", "rows", "blocks", "groups of 32"])
def test_values_are_those_of_ml_dtypes_and_gradients_pass_within_the_range(name, target, shape):
    torch.manual_seed(0)
    fmt = number_format(name, target)
    x = torch.randn(6, 256, dtype=torch.float32)
    scale = torch.rand(shape) * 2 / fmt.full_scale + 1e-3 / fmt.full_scale
    full = {(1, 2): lambda s: s.repeat_interleave(128, 1), (6, 8): lambda s: s.repeat_interleave(32, 1)}
    each = full.get(shape, lambda s: s)(scale).expand(6, 256)

    given = x.clone().requires_grad_()
    weights = torch.randn(6, 256)
    made = fake_quantize(given, scale, fmt.dtype, fmt.full_scale)
    (made * weights).sum().backward()
    assert torch.equal(made, on_grid(x, each.contiguous(), fmt))

    oracle = x.double().requires_grad_()  # the identity within the range, a constant outside
    limit = each.double() * fmt.full_scale
    (torch.clamp(oracle, -limit, limit) * weights.double()).sum().backward()
    inside = (x.double().abs() / limit - 1).abs() > 1e-6  # the edge is where float32 says
    assert torch.equal(given.grad[inside].double(), oracle.grad[inside])
    assert (given.grad[x.abs() > 1.001 * limit] == 0).all() and (x.abs() > 1.001 * limit).any()


def test_the_edge_of_the_range_still_has_a_gradient():
    x = torch.tensor([448.0, -448.0, 448.001, 460.0, 0.0], requires_grad=True)
    fake_quantize(x, torch.ones(1), torch.float8_e4m3fn, 448.0).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0, 1]


def test_values_that_underflow_still_have_a_gradient():
    """So weights that became zero can grow again."""
    x = torch.tensor([2.0**-18, -(2.0**-17), 1e-30, 57344.0, 57345.0], requires_grad=True)
    made = fake_quantize(x, torch.ones(1), torch.float8_e5m2, 57344.0)
    made.sum().backward()
    assert not made[:3].any() and x.grad.tolist() == [1, 1, 1, 1, 0]


def fake(delay, **options):
    scheme = scheme_for(FP8Config(target="cpu", **{"scale_method": "maxabs_arbitrary", **options}))
    return FakeQuant("layer", scheme, delay, ("input",), {"weight": torch.Size((2, 4))}, torch.device("cpu"))


def scale_used(module, largest):
    """The scale with which an input with this range is rounded, by the smallest code, 2^-9; 112 is the divisor."""
    values = module.input(largest * torch.exp2(-torch.linspace(0, 30, 4097))).abs()
    return float(values[values > 0].min()) * 2**9


def test_with_a_history_of_one_each_input_has_its_own_range():
    module = fake(Delay(1))
    for largest in (2.0, 1.0):
        assert scale_used(module, largest) == pytest.approx(largest / 112, rel=1e-2)
        module.finish_step()
        assert module.ranges()["input"] == largest


def test_delayed_ranges_are_the_largest_of_the_last_steps():
    module, seen = fake(Delay(3)), []
    for largest in (4.0, 1.0, 2.0, 1.0, 1.0, 1.0):
        expected = max(seen[-3:], default=largest)  # the first step has none before it
        for _ in range(2):  # accumulation, or recomputation, in one step
            assert scale_used(module, largest) == pytest.approx(expected / 112, rel=1e-2), seen
        seen.append(largest)
        assert module.ranges()["input"] == max(seen[-3:]), "the current step counts for a conversion"
        module.finish_step()
        assert module.ranges()["input"] == max(seen[-3:])


def test_what_was_not_seen_in_a_step_keeps_its_range():
    module = fake(Delay(2))
    module.input(torch.full((3,), 5.0))
    for _ in range(5):
        module.finish_step()
    assert module.ranges() == {"input": 5.0} and int(module.step) == 5


def test_frozen_scales_stay():
    module, weight = fake(Delay(1, freeze_at=2)), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    for largest in (4.0, 3.0):
        module.input(torch.full((3,), largest))
        module.weight("weight", weight)
        assert module.frozen_scale("weight") is None
        module.finish_step()
    first = module.weight("weight", weight)
    scale = module.frozen_scale("weight").clone()
    assert torch.equal(first, fake(Delay()).weight("weight", weight))
    for largest in (10.0, 0.5):
        assert scale_used(module, largest) == pytest.approx(3 / 112, rel=1e-2)
        module.weight("weight", weight * largest)
        module.finish_step()
    assert module.ranges()["input"] == 3.0 and torch.equal(module.frozen_scale("weight"), scale)
    saturated = (scale * 448).item()
    assert module.weight("weight", weight * 1000).max() == pytest.approx(saturated)


def test_evaluation_changes_nothing():
    module = fake(Delay(2, freeze_at=1)).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.input(torch.ones(3))
    module.weight("weight", torch.ones(2, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items() if "scale" not in name)
    assert module.ranges() == {}


def test_state_is_what_a_state_dict_holds():
    module, other = fake(Delay(2, freeze_at=1)), fake(Delay(2, freeze_at=1))
    module.input(torch.full((3,), 5.0))
    module.finish_step()
    module.weight("weight", torch.ones(2, 4))
    other.load_state_dict(module.state_dict())
    assert other.is_frozen and other.ranges() == module.ranges() == {"input": 5.0}
    assert torch.equal(other.frozen_scale("weight"), module.frozen_scale("weight"))


def test_only_what_is_needed_is_in_a_state_dict():
    assert not fake(Delay(), activation_scheme="dynamic").state_dict()
    assert not fake(Delay(), activation_scheme="weight_only").state_dict()
    assert not fake(Delay(), scale_method="unit_scale").state_dict()
    assert [*fake(Delay(8)).state_dict()] == ["step", "amax_history"]


def test_casts_leave_ranges_in_float32():
    module = nn.Sequential(fake(Delay(2, freeze_at=1))).to(torch.bfloat16)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32, torch.int64}


def test_values_that_are_not_finite_are_named():
    with pytest.raises(FP8ScaleError, match=r"layer: maxabs=\[inf\] is not a range"):
        fake(Delay()).input(torch.tensor([1.0, torch.inf]))
