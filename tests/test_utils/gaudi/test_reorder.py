"""Moves of key-value caches by the emulated operators, written out beam by beam."""

import pytest
import torch
from grids import over

DTYPES = [torch.float8_e4m3fn, torch.bfloat16]


def cache_of(shape, dtype):
    x = torch.randint(0, 100, shape)
    return x.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else x.to(dtype)


def as_numbers(x):
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


@over(dtype=DTYPES)
def test_beams_are_reordered_between_start_and_end(gaudi2, dtype):
    cache = cache_of((2, 4, 3, 6, 5), dtype)
    start, end = torch.tensor([0, 2]), torch.tensor([4, 5])
    beams = torch.tensor([[3, 3, 0, 1], [0, 2, 1, 2]])
    packed = (beams * torch.tensor([64, 16, 4, 1])).sum(1).to(torch.uint8)
    expected = as_numbers(cache).clone()
    for sample in range(2):
        for beam in range(4):
            part = slice(start[sample], end[sample])
            expected[sample, beam, :, part] = as_numbers(cache)[sample, beams[sample, beam], :, part]
    given = as_numbers(cache).clone()
    out = torch.ops.hpu.kv_reorder(cache, start, end, packed)
    assert torch.equal(as_numbers(out), expected) and torch.equal(as_numbers(cache), given)
    assert torch.ops.hpu.kv_reorder_(cache, start, end, packed).data_ptr() == cache.data_ptr()
    assert torch.equal(as_numbers(cache), expected)


@over(dtype=DTYPES)
def test_samples_are_repeated_in_place(gaudi2, dtype):
    x = cache_of((8, 2, 2, 5), dtype)
    expected = as_numbers(x)[[0, 0, 0, 0, 1, 1, 1, 1]]
    assert torch.equal(as_numbers(torch.ops.hpu.in_place_interleave(x)), expected)
    torch.ops.hpu.in_place_interleave_(x)
    assert torch.equal(as_numbers(x), expected)


CACHE, INDEX = torch.ones(2, 4, 6, 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: torch.ops.hpu.kv_reorder_(CACHE, INDEX, INDEX, INDEX), "beam_idx is of uint8"),
        (lambda: torch.ops.hpu.kv_reorder_(CACHE[:1], INDEX, INDEX, INDEX.byte()), "one element for each"),
        (lambda: torch.ops.hpu.kv_reorder_(CACHE[:, :2], INDEX, INDEX, INDEX.byte()), "one of 4 beams"),
        (lambda: torch.ops.hpu.kv_reorder_(CACHE[0], INDEX, INDEX, INDEX.byte()), "batch, beams"),
        (lambda: torch.ops.hpu.in_place_interleave_(CACHE), "multiple of 4"),
        (lambda: torch.ops.hpu.in_place_interleave_(torch.ones(4, 2, 2)), "4D tensor"),
    ],
)
def test_refused(gaudi2, call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
