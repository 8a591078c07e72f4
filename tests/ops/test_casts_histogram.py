"""The histogram of magnitudes: numpy's counts of the upper bits, on the reference and on every native variant."""

import numpy as np
import pytest
import torch
from grids import over

from optimum_fp8 import ops

SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-40, 2.0**-130, 2.0**-126, 3.4e38, 65504.0, 6e-8]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def by_numpy(x):
    bits = x.float().contiguous().numpy().view(np.uint32).ravel() & 0x7FFFFFFF
    return torch.from_numpy(np.bincount(bits >> 19, minlength=4096))


def assert_everywhere(x):
    expected = by_numpy(x)
    largest = x.float().abs().max().reshape(1) if x.numel() else torch.zeros(1)
    for backend in ("reference", *ops.cpu.backends()):
        with ops.backend(backend):
            counts, maxabs = ops.histogram(x)
        assert counts.dtype == torch.int64 and torch.equal(counts, expected), backend
        assert maxabs.shape == (1,) and maxabs.dtype == torch.float32
        torch.testing.assert_close(maxabs, largest, rtol=0, atol=0, equal_nan=True, msg=backend)


@over(dtype=DTYPES, count=[0, 1, 7, 31, 32, 33, 100, 70_001])
def test_counts_and_the_largest(dtype, count):
    x = (torch.randn(count) * torch.exp2(torch.randint(-140, 120, (count,)).float())).to(dtype)
    assert_everywhere(x)


@pytest.mark.core
@over(dtype=DTYPES)
def test_zero_subnormals_infinity_and_nan_are_counted(dtype):
    x = torch.tensor(SPECIAL).to(dtype)
    assert_everywhere(x)
    assert_everywhere(x.repeat(50))
    assert_everywhere(x[~x.isnan()])
    assert_everywhere(x[x.isfinite()])
    counts, _ = ops.histogram(x)
    assert counts.sum() == len(SPECIAL) and counts[4080:].sum() == (~x.isfinite()).sum()
    assert counts[0] == (x.float().abs() < 2.0**-130).sum(), "zeros and what is next to nothing"


@over(dtype=DTYPES)
def test_any_layout(dtype):
    x = torch.randn(37, 3, 64).to(dtype)
    for each in (x.transpose(0, 2), x[:, 1], x[..., ::3], x[:1].expand(9, -1, -1), x.flatten()[1:]):
        assert_everywhere(each)


def test_every_bfloat16_is_in_the_bin_of_its_upper_bits():
    bits = torch.arange(1 << 15, dtype=torch.int16)
    counts, maxabs = ops.histogram(bits.view(torch.bfloat16))
    assert counts.unique().tolist() == [8] and bool(maxabs.isnan())


def test_what_the_native_library_does_not_take_the_reference_does():
    x = torch.randn(50, dtype=torch.float64)
    counts, maxabs = ops.histogram(x)
    assert torch.equal(counts, by_numpy(x)) and maxabs.item() == x.abs().max().float().item()


def test_torch_knows_its_schema_and_shapes():
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for x in (torch.randn(4, 6), torch.randn(6, 4).bfloat16().t(), torch.empty(0, 3)):
        torch.library.opcheck(torch.ops.optimum_fp8.histogram, (x,), test_utils=utils)
    counts, maxabs = ops.histogram(torch.empty(5, device="meta"))
    assert (counts.shape, counts.dtype, maxabs.shape) == ((4096,), torch.int64, (1,))


def test_several_threads_count_everything_once():
    before, x = torch.get_num_threads(), torch.randn(300_000).bfloat16()
    torch.set_num_threads(3)
    try:
        assert_everywhere(x)
    finally:
        torch.set_num_threads(before)
