"""What INC left at a path, of all ranks, as one value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure import Measurements, read_inc
from optimum_fp8.measure.inc import RANGES, File, FileName, Node, nodes_of, write_file

DATA = Path(__file__).parents[2] / "data" / "inc"
SAMPLES = DATA / "measurements"


def node(*inputs: float, weight: float | None = None) -> Node:
    values = tuple(torch.tensor([[value]]) for value in inputs)
    return Node(values, None, None if weight is None else {"weight": torch.tensor([[weight]])})


def ranks(folder, *files: dict[str, Node], world: int | None = None, samples: int = 0) -> str:
    for rank, nodes in enumerate(files):
        name = FileName(str(folder / "m"), world=len(files) if world is None else world, rank=rank)
        write_file(name, File(RANGES, nodes, rank, samples, list(nodes)))
    return str(folder / "m")


@pytest.mark.core
def test_everything_at_a_prefix():
    found = read_inc(SAMPLES / "pcs_weights" / "measure")
    assert (found.mode, found.modules, found.samples, found.ranks) == ("DynamicRange", ["0", "2"], 0, 0)
    assert found.ranges["0"].inputs[0].item() == 10.25 and found.ranges["0"].params["weight"].item() == 0.353515625
    scales = found.scales["ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2"]["2"]
    assert scales.inputs[0].item() == 0.0625 and scales.params["weight"][0].shape == (4,)
    shapes = read_inc(SAMPLES / "shape_mode")
    assert shapes.mode == "Shape" and shapes.shapes["0"].inputs[0].tolist() == [[2.0, 4.0]]
    assert shapes.modules == ["emb", "c", "fc", "unused", "0"]


def test_outputs():
    tensors = read_inc(SAMPLES / "with_outputs_measure_exclude_NONE").tensors()
    assert tensors["0", "output"].range().item() == 5.5625 and ("0", "output2") not in tensors


@pytest.mark.core
def test_the_ranks_are_merged(tmp_path):
    first, second = {"a": node(1.0, weight=4.0), "e.0": node(7.0)}, {"a": node(3.0, weight=2.0), "e.1": node(5.0)}
    found = read_inc(ranks(tmp_path, first, second, samples=6))
    assert (found.ranks, found.samples, found.modules) == (2, 6, ["a", "e.0", "e.1"])
    values = {key: observer.range().item() for key, observer in found.tensors().items()}
    assert values == {("a", "input"): 3.0, ("a", "weight"): 4.0, ("e.0", "input"): 7.0, ("e.1", "input"): 5.0}


@pytest.mark.parametrize("path", ["m", "", "m_hooks_maxabs_1_2.npz", "m_hooks_maxabs_0_2"])
def test_one_rank_leads_to_the_others(tmp_path, path):
    ranks(tmp_path, {"a": node(1.0)}, {"a": node(3.0)})
    assert Measurements.load(tmp_path / path).range("a").item() == 3.0


@pytest.mark.core
def test_a_rank_that_is_missing_is_named(tmp_path):
    with pytest.raises(FP8MeasurementError, match=r"of 2 ranks, the files of 0 are missing.*measure_hooks_maxabs_0_2"):
        Measurements.load(SAMPLES / "two_rank_naming" / "measure")
    with pytest.raises(FP8MeasurementError, match="of 8 ranks, the files of 2, 3, 4, 5, 6, 7 are missing"):
        read_inc(ranks(tmp_path, {"a": node(1.0)}, {"a": node(1.0)}, world=8))


def test_two_sets_are_told_apart_by_a_file(tmp_path):
    prefix = ranks(tmp_path, {"a": node(1.0)})
    ranks(tmp_path, {"a": node(1.0)}, {"a": node(3.0)})
    with pytest.raises(FP8MeasurementError, match="more than one set .*m_hooks_…_1, .*m_hooks_…_2.*such as .*_0_2"):
        read_inc(prefix)
    assert read_inc(f"{prefix}_hooks_maxabs_0_1.json").tensors()["a", "input"].range().item() == 1.0
    assert read_inc(f"{prefix}_hooks_maxabs_0_2.json").tensors()["a", "input"].range().item() == 3.0


def test_scales_of_one_rank_only_do_not_keep_ranges_from_being_read(tmp_path):
    prefix = ranks(tmp_path, {"a": node(1.0)}, {"a": node(3.0)})
    scales = FileName(prefix, method="MAXABS_HW", world=2, rank=0)
    write_file(scales, File("Scale", {"a": Node((torch.tensor(1.0),))}, 0))
    assert Measurements.load(prefix).range("a").item() == 3.0
    with pytest.raises(FP8MeasurementError, match="MAXABS_HW_1_2"):
        read_inc(prefix)


def test_ranges_of_channels_are_read_as_their_largest(tmp_path):
    name = FileName(str(tmp_path / "m"), "maxabs_per_channel")
    values = torch.tensor([[1.0], [5.0], [2.0]])
    write_file(name, File(RANGES, {"fc": Node((values,), None, {"weight": values})}))
    assert Measurements.load(tmp_path / "m").range("fc").item() == 5.0
    assert torch.equal(read_inc(tmp_path / "m").ranges["fc"].inputs[0], values)


@pytest.mark.parametrize(
    ("mode", "nodes"), [("Scale", {"a": node(1.0)}), ("DynamicRange", {}), ("Odd", {"a": node(1.0)})]
)
def test_files_called_as_measurements_that_hold_none(tmp_path, mode, nodes):
    write_file(FileName(str(tmp_path / "m")), File(mode, nodes))
    with pytest.raises(FP8MeasurementError, match="m_hooks_maxabs (holds no ranges|is of INC's mode 'Odd')"):
        Measurements.load(tmp_path / "m")


def test_ranks_that_are_of_different_models(tmp_path):
    with pytest.raises(FP8MeasurementError, match="disagree about a: params"):
        read_inc(ranks(tmp_path, {"a": node(1.0, weight=1.0)}, {"a": node(1.0)}))


@pytest.mark.core
@pytest.mark.parametrize("folder", ["measured", *(path.name for path in SAMPLES.iterdir())])
def test_through_our_measurements_and_back_nothing_changes(tmp_path, folder):
    place = DATA / folder if folder == "measured" else SAMPLES / folder
    if folder == "two_rank_naming":  # what there is of it, as if it were both
        for path in place.glob("*_1_2.*"):
            shutil.copy(path, tmp_path / path.name)
            shutil.copy(path, tmp_path / path.name.replace("_1_2", "_0_2"))
        place = tmp_path
    ranges = read_inc(place).ranges
    if folder == "shape_mode":
        assert ranges == {}
        return
    Measurements.load(place).save(tmp_path / "ours")
    again = nodes_of(Measurements.load(tmp_path / "ours").tensors).nodes
    assert {name: repr(node) for name, node in again.items()} == {name: repr(node) for name, node in ranges.items()}


def test_a_range_without_a_value(tmp_path):
    tree = {"LocalRank": None, "Mode": "DynamicRange", "Nodes": {"a": {"inputs": [[]]}}}
    (tmp_path / "m_hooks_maxabs.json").write_text(json.dumps(tree))
    with pytest.raises(FP8MeasurementError, match="a, input 1"):
        read_inc(tmp_path).tensors()
