"""Shuffling: asked for by a key, the same for each seed, of any kind of data that can be."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pandas
import pytest
import torch
from tiny_models import tiny_llama
from torch.utils.data import DataLoader

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import check_dataset, facts_of
from optimum_fp8.calibration.order import drawn
from optimum_fp8.errors import FP8CalibrationError

COUNT = 40
ROWS = [{"input_ids": [number], "text": f"{number}"} for number in range(COUNT)]
LLAMA = facts_of(tiny_llama())


def in_a_file(path):
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return path / "rows.jsonl"


def in_a_folder(path):
    in_a_file(path)
    return path


KINDS = {
    "list of dicts": lambda path: ROWS,
    "list of batches": lambda path: [{"input_ids": torch.tensor([row["input_ids"]])} for row in ROWS],
    "Dataset": lambda path: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda path: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "DataFrame": lambda path: pandas.DataFrame(ROWS),
    "file": in_a_file,
    "folder": in_a_folder,
}


@pytest.fixture
def numbers(load):
    """`numbers(dataset, seed)`: which samples are taken, in their order; without a seed, unshuffled."""

    def numbers(dataset, seed=None, **keys):
        if seed is not None:
            keys |= {"shuffle_calibration_samples": True, "calibration_seed": seed}
        return [batch["input_ids"].item() for batch in load(dataset, LLAMA, **keys)]

    return numbers


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_samples(kind, numbers, tmp_path):
    dataset = KINDS[kind](tmp_path)
    assert numbers(dataset) == list(range(COUNT)), "in order, unless asked for"
    assert numbers(dataset, 1) == numbers(dataset, 1) != numbers(dataset, 2)
    assert sorted(numbers(dataset, 1)) == list(range(COUNT)) != numbers(dataset, 1)
    few = numbers(dataset, 3, num_calibration_samples=6)
    assert len(set(few)) == 6 and max(few) > 6, "from the whole of the data"


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset, found",
    [
        (DataLoader([torch.ones(2)]), "a DataLoader or another iterable of batches"),
        ((batch for batch in [torch.ones(1, 2)]), "a DataLoader or another iterable of batches"),
        (lambda model: None, "a callable that is given the model"),
    ],
    ids=["DataLoader", "generator", "callable"],
)
def test_data_that_cannot_be_shuffled(dataset, found):
    config = FP8Config(dataset=dataset, shuffle_calibration_samples=True)
    message = f"shuffle_calibration_samples=True does not go with {found}: shuffle the data beforehand"
    source = check_dataset(dataset)
    with pytest.raises(FP8CalibrationError, match=message):
        source.opened(dataset, config, LLAMA)
    with pytest.raises(FP8CalibrationError, match=message):
        source.run(dataset, tiny_llama(), config, list)


def test_each_sample_of_a_stream_has_the_same_chance():
    seen = Counter()
    for seed in range(400):
        config = FP8Config(num_calibration_samples=5, calibration_seed=seed, shuffle_calibration_samples=True)
        seen.update(drawn(range(20), config))
    assert set(seen) == set(range(20)) and sum(seen.values()) == 2000
    assert max(abs(count - 100) for count in seen.values()) < 40  # five standard deviations are 43


def test_a_stream_is_shuffled_in_a_bounded_buffer(numbers):
    read = []

    def generate():
        for number in range(5000):
            read.append(number)
            yield {"input_ids": [number]}

    found = numbers(datasets.IterableDataset.from_generator(generate), 0, num_calibration_samples=4)
    assert len(found) == 4 and max(found) > 4 and len(read) <= 1100
