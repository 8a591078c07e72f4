"""Searches for the least squared error, against a search written in numpy."""

import ml_dtypes
import numpy as np
import pytest
import torch

from optimum_fp8.formats import number_format
from optimum_fp8.scales import weight_scale

POW2 = [2.0**e for e in range(-10, 10)]
HARDWARE = {
    "gaudi2": [16.0, 1.0, 2.0**-4, 2.0**-8],
    "gaudi3": [2.0**e for e in range(7, -56, -1)],
    "cpu": [2.0**e for e in range(7, -56, -1)],
}
NUMPY_DTYPES = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}


def round_trip(weight, scale, fmt):
    """Powers of two as scales make every step but the cast exact."""
    codes = (weight / np.float32(scale)).clip(-fmt.full_scale, fmt.full_scale).astype(NUMPY_DTYPES[fmt.name])
    return codes.astype(np.float32) * np.float32(scale)


def errors(weight, candidates, fmt):
    weight = weight.float().numpy()
    return [np.linalg.norm((weight - round_trip(weight, c, fmt)).astype(np.float64)) for c in candidates]


@pytest.mark.parametrize("fp8", ["E4M3", "E5M2"])
@pytest.mark.parametrize("std", [1e-4, 0.02, 1.0, 500.0])
@pytest.mark.parametrize(
    "method, target",
    [*[("maxabs_hw_opt_weight", target) for target in HARDWARE], ("maxabs_pow2_opt_weight", "gaudi2")],
)
def test_tensor_search_finds_the_least_error(method, target, std, fp8):
    candidates = POW2 if "pow2" in method else HARDWARE[target]
    fmt, weight = number_format(fp8, target), torch.randn(16, 32) * std
    scale = weight_scale(weight, method=method, target=target, fp8_config=fp8, hp_dtype="fp32").item()
    by_candidate = dict(zip(candidates, errors(weight, candidates, fmt), strict=True))
    assert by_candidate[scale] <= min(by_candidate.values()) * (1 + 1e-6)


@pytest.mark.parametrize(
    "method, target, expected",
    [
        ("maxabs_hw_opt_weight", "gaudi2", 2.0**-8),
        ("maxabs_hw_opt_weight", "gaudi3", 2.0**-55),
        ("maxabs_hw_opt_weight", "cpu", 2.0**-55),
        ("maxabs_pow2_opt_weight", "gaudi2", 2.0**9),
        ("maxabs_pow2_opt_weight", "cpu", 2.0**9),
    ],
)
def test_among_equals_the_last_of_the_list_wins(method, target, expected):
    assert weight_scale(torch.zeros(4, 4), method=method, target=target).item() == expected


def test_one_is_exact_at_every_scale_so_the_list_decides():
    # 1.0 is a code under scales 2^-8 (256) to 2^9 (2^-9, the smallest subnormal); 2^-10 and 2^-9 would saturate.
    weight = torch.ones(2, 2)
    assert weight_scale(weight, method="maxabs_pow2_opt_weight").item() == 2.0**9
    assert weight_scale(weight, method="maxabs_hw_opt_weight").item() == 2.0**-8
    assert weight_scale(weight, method="maxabs_hw_opt_weight", target="gaudi2").item() == 2.0**-4


@pytest.mark.parametrize("fp8", ["E4M3", "E5M2"])
@pytest.mark.parametrize("target", ["gaudi2", "gaudi3", "cpu"])
@pytest.mark.parametrize("method", ["act_maxabs_hw_weights_pcs_opt_pow2", "act_maxabs_pow2_weights_pcs_opt_pow2"])
def test_channel_search_takes_the_smallest_scale_of_the_least_error(method, target, fp8):
    fmt = number_format(fp8, target)
    weight = torch.randn(12, 40) * 2.0 ** torch.arange(-8.0, 4.0)[:, None]
    scales = weight_scale(weight, method=method, target=target, fp8_config=fp8)
    assert scales.shape == (12, 1)
    for row, scale in zip(weight, scales.flatten().tolist(), strict=True):
        start = 2.0 ** np.ceil(np.log2(row.abs().max().item() / (fmt.full_scale * 0.5)))
        candidates = [start * 2.0**k for k in range(-3, 5)]
        by_candidate = dict(zip(candidates, errors(row, candidates, fmt), strict=True))
        least = min(by_candidate.values())
        assert by_candidate[scale] <= least * (1 + 1e-6)
        assert all(error > least * (1 - 1e-6) for candidate, error in by_candidate.items() if candidate < scale)


def test_channel_search_works_on_convolutions():
    weight = torch.randn(6, 3, 3, 3)
    scales = weight_scale(weight, method="act_maxabs_pow2_weights_pcs_opt_pow2")
    flat = weight_scale(weight.flatten(1), method="act_maxabs_pow2_weights_pcs_opt_pow2")
    assert scales.shape == (6, 1, 1, 1) and torch.equal(scales.flatten(), flat.flatten())


def test_channel_search_is_never_worse_than_maxabs():
    weight = torch.randn(8, 64) * 0.02
    weight[3, 5] = 2.0
    fmt = number_format("E4M3", "gaudi2")

    def error_of(method):
        scales = weight_scale(weight, method=method, target="gaudi2")
        return [errors(row, [scale], fmt)[0] for row, scale in zip(weight, scales.flatten().tolist(), strict=True)]

    searched, plain = error_of("act_maxabs_hw_weights_pcs_opt_pow2"), error_of("act_maxabs_hw_weights_pcs_maxabs_pow2")
    assert all(ours <= theirs * (1 + 1e-6) for ours, theirs in zip(searched, plain, strict=True))


def test_zero_channel_leaves_the_others_alone():
    weight = torch.randn(4, 16)
    others = weight_scale(weight[1:], method="act_maxabs_hw_weights_pcs_opt_pow2")
    weight[0] = 0
    scales = weight_scale(weight, method="act_maxabs_hw_weights_pcs_opt_pow2")
    assert torch.equal(scales[1:], others)
    assert 0 < scales[0].item() < 1e-30
