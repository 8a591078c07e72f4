"""Single files of INC's: read and written again, they are the same to the byte."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure.inc import FileName, read_file, write_file

DATA = Path(__file__).parents[2] / "data" / "inc"
SAMPLES = sorted(path.with_suffix("") for path in DATA.glob("**/*_hooks_*.npz"))
LIST = "_mod_list.json"


def moved(path: Path, folder: Path) -> FileName:
    name = FileName.parse(str(path))
    return FileName(str(folder / Path(name.prefix).name), name.observer, name.method, name.world, name.rank)


def pair(folder, nodes, *, npz=True, json_too=True, **head):
    """Files as INC writes them, from nodes of nested lists."""
    tree = {"GlobalRank": None, "LocalRank": None, "Mode": "DynamicRange", **head, "Nodes": nodes}
    name = FileName(str(folder / "m"))
    if json_too:
        Path(f"{name}.json").write_text(json.dumps(tree))
    if npz:
        np.savez(f"{name}.npz", tree)
    return name


@pytest.mark.core
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_both_ways_to_the_byte(tmp_path, path):
    name = moved(path, tmp_path)
    written = write_file(name, read_file(FileName.parse(str(path))))
    assert {Path(each).name for each in written} == {
        each.name for each in path.parent.glob(f"{path.name}*") if _of(path, each)
    }
    for ending in (".json", LIST):
        if Path(f"{path}{ending}").exists():
            assert Path(f"{name}{ending}").read_text() == Path(f"{path}{ending}").read_text()
    member = zipfile.ZipFile(f"{name}.npz").read("arr_0.npy")
    assert member == zipfile.ZipFile(f"{path}.npz").read("arr_0.npy")
    assert len(list(tmp_path.iterdir())) == len(written), "nothing else is left"


def _of(path: Path, other: Path) -> bool:
    return other.name in (f"{path.name}.json", f"{path.name}.npz", f"{path.name}{LIST}")


@pytest.mark.parametrize(
    ("name", "observer", "method", "world", "rank"),
    [
        ("m_hooks_maxabs", "maxabs", "", 0, 0),
        ("m_hooks_maxabs_6_8", "maxabs", "", 8, 6),
        ("m_hooks_maxabs_MAXABS_HW", "maxabs", "MAXABS_HW", 0, 0),
        ("m_hooks_maxabs_MAXABS_POW2_0_2", "maxabs", "MAXABS_POW2", 2, 0),
        ("m_hooks_maxabs_per_channel_1_2", "maxabs_per_channel", "", 2, 1),
        (
            "m_hooks_maxabs_ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2",
            "maxabs",
            "ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2",
            0,
            0,
        ),
        ("m_hooks_shape", "shape", "", 0, 0),
    ],
)
def test_names(name, observer, method, world, rank):
    parsed = FileName.parse(f"folder/{name}.npz")
    assert parsed == FileName("folder/m", observer, method, world, rank) and str(parsed) == f"folder/{name}"


def test_other_names_are_no_files_of_incs():
    assert FileName.parse("folder/measure_measurements.safetensors") is None
    assert FileName.parse("a_hooks_x/model.npz") is None


@pytest.mark.core
def test_where_the_two_differ_the_npz_counts_and_a_warning_says_so(tmp_path, caplog):
    name = pair(tmp_path, {"fc": {"inputs": [[[1.0]]]}})
    read_file(name)
    assert not caplog.records
    pair(tmp_path, {"fc": {"inputs": [[[2.0]]]}}, npz=False)
    assert read_file(name).nodes["fc"].inputs[0].item() == 1.0
    assert "m_hooks_maxabs.npz" in caplog.text and "m_hooks_maxabs.json differ (fc)" in caplog.text


@pytest.mark.parametrize("kept", ["npz", "json"])
def test_one_of_the_two_is_enough(tmp_path, kept):
    name = pair(tmp_path, {"fc": {"inputs": [[[1.5]]]}}, npz=kept == "npz", json_too=kept == "json", NumSamples=12)
    found = read_file(name)
    assert found.nodes["fc"].inputs[0].tolist() == [[1.5]] and found.samples == 12 and found.modules is None


def test_what_older_versions_and_torch_compile_write(tmp_path):
    node = {"input": [[[1.0]], [[2.0]]], "output": [[[3.0]]], "params": {"weight": [[4.0]]}}
    name = pair(tmp_path, {"_orig_mod.layers.0._orig_mod.fc": node})
    ((module, found),) = read_file(name).nodes.items()
    assert module == "layers.0.fc" and [value.item() for value in found.inputs] == [1.0, 2.0]
    assert found.outputs[0].item() == 3.0 and torch.equal(found.params["weight"], torch.tensor([[4.0]]))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"Nodes": {}}', '{"Mode": "DynamicRange", "Nodes": {"a": {"inputs": 1}}}']
)
def test_what_is_no_measurements_file(tmp_path, content):
    (tmp_path / "m_hooks_maxabs.json").write_text(content)
    with pytest.raises(FP8MeasurementError, match="m_hooks_maxabs.json"):
        read_file(FileName(str(tmp_path / "m")))


def test_neither(tmp_path):
    with pytest.raises(FP8MeasurementError, match=r"neither .*m_hooks_maxabs.npz nor .*json exists"):
        read_file(FileName(str(tmp_path / "m")))


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path, monkeypatch):
    name = pair(tmp_path, {"fc": {"inputs": [[[1.5]]]}})
    content, before = read_file(name), Path(f"{name}.npz").read_bytes()

    def fails(file, tree):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError):
        write_file(name, content)
    assert Path(f"{name}.npz").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"m_hooks_maxabs.json", "m_hooks_maxabs.npz"}


def test_a_range_that_is_negative(tmp_path):
    name = pair(tmp_path, {"a": {"inputs": [[-1.0]]}}, npz=False)
    with pytest.raises(FP8MeasurementError, match="damaged .*a negative value, -1.0"):
        read_file(name)


def test_a_number_that_no_float_holds(tmp_path):
    name = pair(tmp_path, {"a": {"inputs": [[10**400]]}}, npz=False)
    with pytest.raises(FP8MeasurementError, match="damaged"):
        read_file(name)
