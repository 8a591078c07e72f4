"""Sums over processes: in high precision, and in FP8 within the bound of its two roundings, for half of the bytes."""

from __future__ import annotations

import pytest
import torch
from ranks import succeed

from optimum_fp8.modules.all_reduce import Peers

IN_FP8 = """
import itertools
import torch
import torch.distributed as dist
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.formats import number_format
from optimum_fp8.modules import all_reduce
from optimum_fp8.modules.all_reduce import Peers

dist.init_process_group("gloo")
sent = []

def counting(name):
    original = getattr(dist, name)

    def counted(output, given, *args, **kwargs):
        others = given.numel() * given.element_size()
        sent.append(others * (count - 1) // (1 if name != "all_to_all_single" else count))
        return original(output, given, *args, **kwargs)

    return counted

dist.all_to_all_single = counting("all_to_all_single")
all_reduce._all_gather = counting("all_gather_into_tensor")

torch.manual_seed(0)
peers = Peers(count, rank)
formats = [("E4M3", "cpu"), ("E4M3", "gaudi2"), ("E5M2", "cpu")]
for (name, target), shape, dtype in itertools.product(
    formats, [(2, 1, 12), (3, 1, 7), (1,), (0, 4)], [torch.float32, torch.bfloat16]
):
    fmt = number_format(name, target)
    partial = 3 * torch.randn(count, *shape).to(dtype)
    exact = partial.double().sum(0)
    largest = float(partial.abs().amax()) if partial.numel() else 1.0
    scales = [torch.tensor([size / fmt.full_scale]) for size in (largest, count * largest)]
    mine = partial[rank].clone()
    sent.clear()
    found = peers.all_reduce_in_fp8(mine, *scales, fmt)
    assert found.shape == mine.shape and found.dtype == dtype and torch.equal(mine, partial[rank])

    # Half a unit in the last place of each value, or of the smallest one of the format.
    step = 2.0 ** -4 if name == "E4M3" else 2.0 ** -3
    least = 2.0 ** -10 if name == "E4M3" else 2.0 ** -17
    rounded = (partial.double().abs() * step + scales[0].double() * least).sum(0)
    bound = rounded + (exact.abs() + rounded) * (step + torch.finfo(dtype).eps) + scales[1].double() * least
    assert bool(((found.double() - exact).abs() <= bound).all()), (name, shape, dtype)

    everywhere = [torch.empty_like(found) for _ in range(count)]
    dist.all_gather(everywhere, found.contiguous())
    assert all(torch.equal(other, found) for other in everywhere), "the same in all processes"

    # A ring sends 2 (n - 1) / n values of the whole in high precision; this as many values of one byte.
    share = -(-mine.numel() // count)
    assert sent == [share * (count - 1)] * 2, sent
    if mine.numel() % count == 0:
        in_bfloat16 = 2 * 2 * (count - 1) * mine.numel() // count
        assert 2 * sum(sent) == in_bfloat16

fmt = number_format("E4M3", "cpu")
one = torch.ones(1)
assert peers.all_reduce_in_fp8(torch.full((2, 1, 2), 1e6), one, one * count, fmt).unique().item() == 448 * count
try:
    Peers(count + 1, rank).all_reduce_in_fp8(torch.ones(4), one, one, fmt, "layer")
except FP8NotAvailableError as error:
    assert "layer" in str(error) and f"found one of {count}" in str(error), error
else:
    raise AssertionError("a group of another size")

x = torch.full((2, 3), float(rank + 1))
assert torch.equal(peers.all_reduce(x.t()), torch.full((3, 2), count * (count + 1) / 2))
assert torch.equal(peers.all_gather(torch.full((2, 1), float(rank))), torch.arange(count).float().expand(2, count))
"""


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sum_in_fp8_is_within_its_bound_and_the_same_everywhere(tmp_path, count):
    succeed(IN_FP8, count, tmp_path)


def test_one_process_says_nothing():
    x = torch.randn(3, 4)
    assert Peers().all_reduce(x) is x and Peers().all_gather(x) is x
