"""The Measurements store: exact, atomic, mergeable, and never applied to another model unnoticed."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optimum_fp8 import Measurements
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure import measurements_path, observer_class


def measured(*tensors, fingerprint="f" * 32, samples=1, data="d"):
    measurements = Measurements(fingerprint, samples=samples, data=data)
    for x in tensors:
        measurements.observe("model.layers.0.fc/1", "input", x)
    return measurements


def same(a, b):
    assert (a.fingerprint, a.samples, a.data) == (b.fingerprint, b.samples, b.data)
    assert a.tensors.keys() == b.tensors.keys()
    for key, observer in a.tensors.items():
        for name, value in observer.statistics().items():
            other = b.tensors[key].statistics()[name]
            assert torch.equal(value, other) and (value.dtype, value.shape) == (other.dtype, other.shape)
    return True


@pytest.mark.core
def test_saved_and_loaded_is_the_same(tmp_path):
    measurements = measured(torch.tensor([0.1, -1e-30]), torch.tensor([3.3e30]), samples=7)
    measurements.observe("äöü.1", "output", torch.randn(3).bfloat16())
    measurements.observe("fc", "weight", torch.randn(3, 4))
    path = measurements.save(tmp_path / "deep" / "folder" / "measure")
    assert path == measurements_path(tmp_path / "deep" / "folder" / "measure")
    assert same(measurements, Measurements.load(tmp_path / "deep" / "folder" / "measure"))


def test_a_bare_prefix_is_a_file_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured(torch.ones(1)).save("measure")
    assert Measurements.load("measure").range("model.layers.0.fc/1") == 1.0


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    measured(torch.ones(1)).save(tmp_path / "measure")
    measured(torch.ones(1) * 5).save(tmp_path / "measure")
    assert Measurements.load(tmp_path / "measure").range("model.layers.0.fc/1") == 5.0
    assert len(os.listdir(tmp_path)) == 1


def test_the_file_can_be_read_by_others(tmp_path):
    path = measured(torch.ones(1)).save(tmp_path / "measure")
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask, "like any other file, not only by its owner"


@pytest.mark.core
@pytest.mark.parametrize("crash", ["fsync", "replace"])
def test_a_crash_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch, crash):
    old = measured(torch.ones(1))
    old.save(tmp_path / "measure")

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, crash, fails)
    with pytest.raises(KeyboardInterrupt):
        measured(torch.ones(1) * 5).save(tmp_path / "measure")
    monkeypatch.undo()
    assert same(old, Measurements.load(tmp_path / "measure"))
    assert os.listdir(tmp_path) == ["measure_measurements.safetensors"]


def write_header(path, header, tensors=None):
    metadata = None if header is None else {"measurements": header}
    save_file(tensors if tensors is not None else {"a/input/maxabs": torch.ones(1)}, path, metadata=metadata)


HEADER = {"format_version": 1, "fingerprint": "f", "samples": 1, "data": ""}
MAXABS = torch.ones(1)
STORED = {"a/input/maxabs": MAXABS, "a/input/count": torch.ones(1, dtype=torch.int64)}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a safetensors file at all"),
        lambda path: write_header(path, None),
        lambda path: write_header(path, "not JSON"),
        lambda path: write_header(path, "[]"),
        lambda path: write_header(path, "{}"),
        lambda path: write_header(path, json.dumps({"format_version": 1})),
        lambda path: write_header(path, json.dumps(HEADER)),
        lambda path: write_header(path, json.dumps(HEADER), {"x": MAXABS}),
        lambda path: write_header(path, json.dumps(HEADER), {**STORED, "a/input/kurtosis": MAXABS * 2}),
        lambda path: write_header(path, json.dumps(HEADER), {**STORED, "a/input/maxabs": torch.ones(2)}),
        lambda path: write_header(path, json.dumps(HEADER), {f"a/in put/{key[8:]}": STORED[key] for key in STORED}),
    ],
    ids=[
        "cut", "empty", "other format", "no header", "header not JSON", "header a list", "header empty",
        "header incomplete", "statistic missing", "odd name", "odd statistic", "odd shape", "odd kind",
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, spoil):
    path = measured(torch.ones(1)).save(tmp_path / "measure")
    spoil(type(tmp_path)(path))
    with pytest.raises(FP8MeasurementError, match="measure_measurements.safetensors .*measure again"):
        Measurements.load(tmp_path / "measure")


def test_a_file_that_names_no_observer_is_of_maxabs(tmp_path):
    tensors = {**STORED, "a/k/maxabs": MAXABS * 3, "a/k/count": torch.tensor([5]), "a/k/maxabs_per_head": MAXABS * 3}
    write_header(measurements_path(tmp_path / "measure"), json.dumps(HEADER), tensors)
    found = Measurements.load(tmp_path / "measure")
    assert (found.observer, found.range("a"), found.range("a", "k")) == ("maxabs", 1.0, 3.0)
    assert found.range_per_head("a", "k").tolist() == [3.0] and found.range_per_head("a", "input") is None
    assert {key: value.shape for key, value in found.tensors["a", "k"].statistics().items()} == {
        "maxabs": (), "count": (), "maxabs_per_head": (1,)
    }  # fmt: skip


def test_what_an_older_version_reads_is_still_written(tmp_path):
    measurements = Measurements("f", samples=2, data="d")
    measurements.observe("a", "input", torch.ones(2))
    with safe_open(measurements.save(tmp_path / "measure"), "pt") as file:
        header = json.loads(file.metadata()["measurements"])
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "a/input/maxabs": [1.0], "a/input/count": [2]
        }  # fmt: skip
    assert len(header.pop("checksum")) == 64
    assert header == {"format_version": 1, "observer": "maxabs", "fingerprint": "f", "samples": 2, "data": "d"}


def test_a_file_of_a_newer_version(tmp_path):
    write_header(measurements_path(tmp_path / "measure"), json.dumps({**HEADER, "format_version": 99}))
    with pytest.raises(FP8MeasurementError, match="newer optimum_fp8: upgrade"):
        Measurements.load(tmp_path / "measure")


def test_no_file(tmp_path):
    with pytest.raises(FP8MeasurementError, match="no measurements at .*give a `dataset`"):
        Measurements.load(tmp_path / "measure")


@pytest.mark.parametrize("ending", [".json", "_0_2.json", ".npz"])
def test_files_of_incs_that_are_damaged_are_named(tmp_path, ending):
    name = f"measure_hooks_maxabs{ending}"
    (tmp_path / name).write_text("{}")
    with pytest.raises(FP8MeasurementError, match="measure_hooks_maxabs(.json|.npz|_1_2.npz).* copy"):
        Measurements.load(tmp_path / "measure")


# --- merging ------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_merged_runs_are_one_run_over_everything():
    a, b, c = torch.randn(3, 4), torch.randn(2, 4) * 3, torch.randn(5)
    one, two = measured(a, samples=3, data="1" * 32), measured(b, c, samples=4, data="f" * 32)
    assert same(one.merged(two), measured(a, b, c, samples=7, data="1" * 31 + "0"))


def test_merging_unites_modules_and_changes_neither_side():
    one, two = Measurements("f"), Measurements("f")
    one.observe("a", "input", torch.ones(2))
    two.observe("a", "input", torch.ones(2) * 3)
    two.observe("b", "weight", torch.ones(2) * 2)
    merged = one.merged(two)
    assert (merged.range("a"), merged.range("b", "weight")) == (3.0, 2.0)
    assert one.range("a") == 1.0 and one.range("b", "weight") is None and two.range("a") == 3.0


@pytest.mark.core
def test_measurements_of_different_models_cannot_be_merged():
    with pytest.raises(FP8MeasurementError, match="different models .* aaa and bbb"):
        measured(fingerprint="aaa").merged(measured(fingerprint="bbb"))


def test_a_range_that_is_not_finite_names_the_module():
    with pytest.raises(FP8MeasurementError, match=r"model.layers.0.fc/1: the measured input holds NaN or Inf"):
        measured(torch.tensor([float("nan")])).range("model.layers.0.fc/1")


@pytest.mark.core
def test_per_head(tmp_path):
    x = torch.randn(10, 3, 4)
    measurements = Measurements("f")
    measurements.observe("attn", "k_cache", x, per_head=True)
    measurements.observe("attn", "q2", x[0])
    measurements.save(tmp_path / "stats")
    again = Measurements.load(tmp_path / "stats")
    assert same(again, measurements)
    assert torch.equal(again.range_per_head("attn", "k_cache"), x.abs().amax((0, 2)))
    assert again.range("attn", "q2") == x[0].abs().max() and again.range_per_head("attn", "q2") is None
    assert again.range_per_head("attn", "never") is None
    again.merged(measurements).save(tmp_path / "merged")
    assert torch.equal(Measurements.load(tmp_path / "merged").range_per_head("attn", "k_cache"), x.abs().amax((0, 2)))


def test_the_range_of_heads_that_is_not_finite_names_the_module():
    measurements = Measurements("f")
    measurements.observe("attn", "v", torch.full((2, 2, 2), float("nan")), per_head=True)
    with pytest.raises(FP8MeasurementError, match="attn: the measured v holds NaN"):
        measurements.range_per_head("attn", "v")


@pytest.mark.parametrize("kind", ["in/put", "", "käse", "a b"])
def test_kinds_are_names(kind):
    with pytest.raises(FP8MeasurementError, match="names no tensor: expected letters, digits and underscores"):
        Measurements("f").observe("fc", kind, torch.ones(1))


def test_a_parameter_leaves_no_graph():
    measurements = Measurements("f")
    measurements.observe("fc", "weight", torch.nn.Parameter(torch.ones(3)))
    assert not measurements.range("fc", "weight").requires_grad


def test_what_an_observer_has_seen_elsewhere_is_added():
    measurements, elsewhere = measured(torch.ones(2)), observer_class("maxabs")()
    elsewhere.update(torch.ones(3) * 4)
    measurements.add("model.layers.0.fc/1", "input", elsewhere)
    measurements.add("fc", "weight", elsewhere)
    assert measurements.range("model.layers.0.fc/1") == 4.0 == measurements.range("fc", "weight")
    elsewhere.update(torch.ones(3) * 8)
    assert measurements.range("fc", "weight") == 4.0, "a copy of what it knew"


def test_what_was_never_seen_has_no_range():
    assert Measurements("f").range("fc") is None
