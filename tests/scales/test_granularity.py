"""Granularities: the shape of a scale and the ranges behind it, for whole and ragged sizes, against numpy."""

import itertools

import numpy as np
import pytest
import torch

from optimum_fp8.scales import PerBlock, PerChannel, PerGroup, PerHead, PerTensor, PerToken

SHAPES = [(1, 1), (2, 3), (128, 128), (129, 257), (256, 31), (5, 384)]


def by_blocks(x, rows, columns):
    """max|x| of every block of a matrix, one block at a time."""
    starts = [range(0, size, step) for size, step in zip(x.shape, (rows, columns), strict=True)]
    largest = [
        np.abs(x[row : row + rows, column : column + columns]).max() for row, column in itertools.product(*starts)
    ]
    return np.array(largest, dtype=np.float32).reshape([len(each) for each in starts])


def check(granularity, x, expected):
    """The ranges and their shape, of a contiguous tensor, of a strided view of the same values, and in bfloat16."""
    assert granularity.scale_shape(x.shape) == expected.shape
    for case in (x, x.mT.contiguous().mT):
        found = granularity.maxabs(case)
        assert found.dtype == torch.float32 and np.array_equal(found.numpy(), expected), granularity
    rounded = granularity.maxabs(x.bfloat16())
    assert np.array_equal(rounded.numpy(), torch.from_numpy(expected).bfloat16().float().numpy()), granularity


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES)
def test_per_tensor(shape):
    x = torch.randn(shape)
    check(PerTensor(), x, np.abs(x.numpy()).max().reshape(1))


@pytest.mark.core
@pytest.mark.parametrize("shape", [*SHAPES, (6, 4, 3), (6, 4, 3, 5), (6, 4, 1, 2, 3)])
def test_per_channel_has_one_axis_a_dimension(shape):
    x = torch.randn(shape)
    check(PerChannel(), x, np.abs(x.numpy()).max(axis=tuple(range(1, len(shape))), keepdims=True))


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 16), (2, 3, 4, 5)])
def test_per_token(shape):
    x = torch.randn(shape)
    check(PerToken(), x, np.abs(x.numpy()).max(axis=-1, keepdims=True))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 7, 16), (3, 1, 5, 8)])
def test_per_head_is_of_all_rows_of_the_batch_and_all_positions(shape):
    x = torch.randn(shape)
    check(PerHead(), x, np.abs(x.numpy()).max(axis=(0, 2, 3)).reshape(-1, 1, 1))


@pytest.mark.core
@pytest.mark.parametrize("rows, columns", [(128, 128), (1, 128), (64, 32), (3, 5), (1, 1), (1000, 1000)])
@pytest.mark.parametrize("shape", SHAPES)
def test_per_block(rows, columns, shape):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    check(PerBlock(rows, columns), x, by_blocks(x.numpy(), rows, columns))


@pytest.mark.core
@pytest.mark.parametrize("size", [32, 128, 7])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 100)])
def test_per_group(size, shape):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    expected = by_blocks(x.flatten(0, -2).numpy(), 1, size)
    check(PerGroup(size), x, expected.reshape(*shape[:-1], -1))


def test_a_row_of_blocks_is_a_group():
    x = torch.randn(9, 100)
    assert torch.equal(PerBlock(1, 32).maxabs(x), PerGroup(32).maxabs(x))
    assert torch.equal(PerGroup(100).maxabs(x), PerToken().maxabs(x))
    assert torch.equal(PerBlock(9, 100).maxabs(x).flatten(), PerTensor().maxabs(x))


@pytest.mark.parametrize(
    "granularity, group, text",
    [
        (PerTensor(), 0, "per tensor"),
        (PerChannel(), 0, "per channel"),
        (PerToken(), -1, "per token"),
        (PerHead(), 0, "per head"),
        (PerBlock(128, 64), 0, "per block 128×64"),
        (PerGroup(32), 32, "per group of 32"),
    ],
    ids=str,
)
def test_how_operators_and_reports_name_it(granularity, group, text):
    assert (granularity.group, str(granularity)) == (group, text)


def test_they_are_values():
    assert PerBlock(2, 3) == PerBlock(2, 3) != PerBlock(3, 2) and PerGroup(32) != PerGroup(128)
    assert PerTensor() != PerChannel() and len({PerTensor(), PerTensor(), PerToken(), PerBlock(2, 3)}) == 3


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerToken(), PerBlock(2, 2), PerGroup(3)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(granularity, value):
    x = torch.ones(4, 6)
    x[3, 5] = -value
    found = granularity.maxabs(x)
    assert not found.flatten()[-1].isfinite() and found.isfinite().sum() == found.numel() - 1
