"""Calibration data that are batches already."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

DICTS = [{"input_ids": torch.tensor([[n, n]])} for n in range(4)]


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset",
    [
        lambda: (batch for batch in DICTS),
        lambda: iter(DICTS),
        lambda: DICTS,
        lambda: DataLoader(list(range(4)), collate_fn=lambda rows: DICTS[rows[0]]),
    ],
    ids=["generator", "iterator", "list", "DataLoader"],
)
def test_batches_are_passed_on_as_they_are(dataset, load):
    assert all(found is given for found, given in zip(load(dataset()), DICTS, strict=True))


def test_a_torch_dataset_of_tuples_through_a_loader(load):
    loader = DataLoader(TensorDataset(torch.rand(5, 3), torch.arange(5)), batch_size=2)
    assert [len(batch[0]) for batch in load(loader)] == [2, 2, 1]


def test_no_more_of_a_stream_is_read_than_needed(load):
    taken = []

    def stream():
        for n in range(100):
            taken.append(n)
            yield torch.ones(2, 3)

    assert len(load(stream(), num_calibration_samples=6)) == 3
    assert len(taken) <= 4


def test_a_generator_of_one_endless_batch_ends(load):
    def endless():
        while True:
            yield {"input_ids": torch.ones(4, 2, dtype=torch.long)}

    assert len(load(endless(), num_calibration_samples=10)) == 3
