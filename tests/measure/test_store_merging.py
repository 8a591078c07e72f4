"""Merging is exact: measurements of parts, in any order and grouping, are to the byte those of all the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optimum_fp8 import Measurements
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure import added_data, measurements_path

torch.manual_seed(0)
BATCHES = [torch.randn(3, 2, 4) * 10**n for n in range(4)]
WEIGHT = torch.randn(4, 4)
DIGESTS = [f"{n:032x}" for n in (2**127, 2**127 + 5, 7, 2**128 - 1)]


def measured(*numbers, weight=True, names=("b", "a")):
    """Measurements of some of the batches, in the order given."""
    measurements = Measurements("f" * 32, architecture={"act": "SiLU"})
    if weight:
        measurements.observe("b", "weight", WEIGHT)
    for number in numbers:
        for name in names:
            measurements.observe(name, "input", BATCHES[number])
        measurements.observe("a", "k", BATCHES[number], per_head=True)
        measurements.samples += 3
        measurements.data = added_data(measurements.data, DIGESTS[number])
    return measurements


@pytest.mark.core
@pytest.mark.parametrize(
    "merge",
    [
        lambda a, b, c: a.merged(b).merged(c),
        lambda a, b, c: c.merged(a.merged(b)),
        lambda a, b, c: b.merged(c).merged(a),
    ],
)
def test_any_order_and_grouping(merge, tmp_path):
    merged = merge(measured(0, 3), measured(1), measured(2))
    whole = measured(0, 1, 2, 3)
    assert merged.encoded() == whole.encoded()
    assert merged.tensors["b", "weight"].statistics()["count"] == 16, "the weight is the same one: counted once"
    saved = [Path(each.save(tmp_path / name)).read_bytes() for name, each in (("m", merged), ("w", whole))]
    assert saved[0] == saved[1]


def test_the_order_of_modules_does_not_show():
    assert measured(0, names=("b", "a")).encoded() == measured(0, names=("a", "b")).encoded()


def test_a_part_that_has_seen_nothing_adds_nothing():
    assert measured(0).merged(measured()).encoded() == measured(0).encoded() == measured().merged(measured(0)).encoded()
    assert measured(0, weight=False).merged(measured()).encoded() == measured(0).encoded()


def test_data_are_added_whatever_wrote_them():
    assert added_data("", "") == "" and added_data(DIGESTS[2], "") == DIGESTS[2] == added_data("", DIGESTS[2])
    assert added_data(DIGESTS[3], DIGESTS[2]) == f"{6:032x}"
    assert len({added_data("a" * 32 + "+" + "b" * 32, DIGESTS[2]), added_data("a" * 32, DIGESTS[2])}) == 2


def test_weights_must_agree():
    other = Measurements("f" * 32, architecture={"act": "SiLU"})
    other.observe("b", "weight", WEIGHT * 1.01)
    mine = measured(0)
    before = mine.encoded()
    with pytest.raises(FP8MeasurementError, match="b has other statistics of its weight in each; expected the same"):
        mine.include(other)
    assert mine.encoded() == before


def edited(path, change):
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["measurements"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata={"measurements": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: tensors["a/input/maxabs"].mul_(2),
        lambda header, tensors: tensors.pop("a/k/maxabs_per_head"),
        lambda header, tensors: tensors.update({"c/input/maxabs": torch.ones(1)}),
        lambda header, tensors: header.update(samples=512),
        lambda header, tensors: header.update(fingerprint="e" * 32),
    ],
    ids=["value", "statistic", "module", "samples", "model"],
)
def test_an_edited_file_is_refused(tmp_path, change):
    edited(measured(0).save(tmp_path / "measure"), change)
    with pytest.raises(FP8MeasurementError, match="has been changed since it was written: .*measure again"):
        Measurements.load(tmp_path / "measure")


def test_a_file_of_an_older_version_has_no_checksum(tmp_path):
    edited(measured(0).save(tmp_path / "measure"), lambda header, tensors: header.pop("checksum"))
    assert Measurements.load(tmp_path / "measure").encoded() == measured(0).encoded()


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, measurements_path(tmp_path / "measure"), metadata={"format": "pt"})
    with pytest.raises(FP8MeasurementError, match="a safetensors file of something else"):
        Measurements.load(tmp_path / "measure")


def test_one_bit_shows(tmp_path):
    path = Path(measured(0).save(tmp_path / "measure"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FP8MeasurementError, match="the checksum does not fit"):
        Measurements.load(tmp_path / "measure")
