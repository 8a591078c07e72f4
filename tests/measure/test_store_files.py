"""What stands at the place of a measurements file: nothing is lost, and what is none of ours is named."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from optimum_fp8 import Measurements
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure import kept_prefix, measurements_path

A, B = "a" * 32, "b" * 32
INC = Path(__file__).parents[1] / "data" / "inc" / "measured"


def measured(fingerprint=A, value=1.0, **options):
    measurements = Measurements(fingerprint, samples=1, data="d", **options)
    measurements.observe("fc", "input", torch.full((2,), value))
    return measurements


def found(prefix):
    return Measurements.load(prefix).range("fc").item()


@pytest.mark.core
def test_the_file_of_another_model_is_kept_and_said(tmp_path, caplog):
    prefix = tmp_path / "measure"
    measured(A, 1.0).save(prefix)
    measured(B, 2.0).save(prefix)
    kept = kept_prefix(prefix, A)
    assert (found(prefix), found(kept)) == (2.0, 1.0)
    assert measurements_path(prefix) in caplog.text and measurements_path(kept) in caplog.text
    assert f"dump_stats_path={kept!r}" in caplog.text, "what finds it again"


def test_the_file_of_the_same_model_is_replaced_without_a_word(tmp_path, caplog):
    measured(A, 1.0).save(tmp_path / "measure")
    measured(A, 2.0).save(tmp_path / "measure")
    assert found(tmp_path / "measure") == 2.0 and len(os.listdir(tmp_path)) == 1 and not caplog.records


def test_models_that_take_turns_leave_one_file_each_and_each_the_last(tmp_path):
    prefix = tmp_path / "measure"
    for value, fingerprint in enumerate([A, B, A, B, A], start=1):
        measured(fingerprint, float(value)).save(prefix)
    assert found(prefix) == 5.0 and found(kept_prefix(prefix, B)) == 4.0 and found(kept_prefix(prefix, A)) == 3.0
    assert len(os.listdir(tmp_path)) == 3


def test_the_same_weights_in_another_architecture_are_another_model(tmp_path):
    prefix, relu, gelu = tmp_path / "measure", {"1": "ReLU"}, {"1": "GELU"}
    measured(architecture=relu, value=1.0).save(prefix)
    measured(architecture=gelu, value=2.0).save(prefix)
    measured(architecture=relu, value=3.0).save(prefix)
    assert {found(tmp_path / name.removesuffix("_measurements.safetensors")) for name in os.listdir(tmp_path)} == {
        1.0,
        2.0,
        3.0,
    }
    assert Measurements.load(prefix).architecture == relu
    with pytest.raises(FP8MeasurementError, match="different models cannot be merged: 1 is ReLU, not GELU"):
        measured(architecture=relu).merged(measured(architecture=gelu))
    assert measured(architecture=relu).merged(measured()).architecture == relu, "an older file has none"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_text("notes of a colleague"),
        lambda path: shutil.copy(INC / "measure_hooks_maxabs.npz", path),
    ],
    ids=["damaged", "foreign", "INC's"],
)
def test_what_cannot_be_read_is_kept(tmp_path, caplog, spoil):
    prefix, path = tmp_path / "measure", Path(measurements_path(tmp_path / "measure"))
    measured(A).save(prefix)
    spoil(path)
    before = path.read_bytes()
    measured(B, 2.0).save(prefix)
    others = [each for each in tmp_path.iterdir() if each != path]
    assert found(prefix) == 2.0 and [each.read_bytes() for each in others] == [before]
    assert str(others[0]) in caplog.text


def test_saving_where_a_folder_stands_fails_and_leaves_it(tmp_path):
    os.mkdir(measurements_path(tmp_path / "measure"))
    with pytest.raises(OSError):
        measured().save(tmp_path / "measure")
    assert os.listdir(tmp_path) == ["measure_measurements.safetensors"]
    with pytest.raises(FP8MeasurementError, match="is a folder, no measurements file"):
        Measurements.load(tmp_path / "measure")


@pytest.mark.core
@pytest.mark.parametrize(
    "path",
    ["measure", "", "measure_hooks_maxabs", "measure_hooks_maxabs.json", "measure_hooks_maxabs.npz"],
)
def test_incs_files_are_read_however_they_are_pointed_at(tmp_path, path):
    shutil.copytree(INC, tmp_path / "stats")
    found = Measurements.load(os.path.join(tmp_path / "stats", path).rstrip("/"))
    assert (found.fingerprint, found.observer, found.samples) == ("", "maxabs", 0)
    assert {name: found.range(*name).item() for name in found.tensors} == {
        ("0", "input"): 10.25,
        ("0", "weight"): 0.353515625,
        ("2", "input"): 5.4375,
        ("2", "weight"): 0.2412109375,
    }


def test_ours_are_taken_where_incs_are_beside_them(tmp_path):
    shutil.copytree(INC, tmp_path / "stats")
    measured(A, 3.0).save(tmp_path / "stats" / "measure")
    assert found(tmp_path / "stats" / "measure") == 3.0


def test_what_was_read_of_incs_is_kept_in_our_file(tmp_path):
    Measurements.load(INC / "measure").save(tmp_path / "m")
    again = Measurements.load(tmp_path / "m")
    assert again.fingerprint == "" and again.range("0").item() == 10.25


@pytest.mark.parametrize("only", ["MAXABS_ARBITRARY", "mod_list"])
def test_files_of_incs_without_ranges_are_named(tmp_path, only):
    shutil.copytree(INC, tmp_path / "stats", ignore=lambda folder, names: [name for name in names if only not in name])
    with pytest.raises(FP8MeasurementError, match=rf"only INC's own .*{only}.* hold no ranges.*hooks_maxabs.npz"):
        Measurements.load(tmp_path / "stats" / "measure")


@pytest.mark.parametrize("name", ["measure_hooks_maxabs.json", "measure_hooks_maxabs.npz"])
def test_incs_files_under_our_name_are_known(tmp_path, name):
    shutil.copy(INC / name, measurements_path(tmp_path / "measure"))
    with pytest.raises(FP8MeasurementError, match=r"measure_measurements.safetensors is a file of INC's: give it"):
        Measurements.load(tmp_path / "measure")


@pytest.mark.parametrize("path", ["", "m_measurements.safetensors"])
def test_the_folder_or_the_file_instead_of_the_prefix(tmp_path, path):
    measured().save(tmp_path / "m")
    with pytest.raises(FP8MeasurementError, match=rf"set it to '{tmp_path}/m'"):
        Measurements.load(os.path.join(tmp_path, path).rstrip("/"))


def test_one_short_line_tells_what_they_are(caplog):
    caplog.set_level(logging.INFO)
    measurements = measured(A)
    measurements.observe("fc", "weight", torch.ones(3, 3))
    text = f"Measurements(2 tensors of 1 modules, 1 samples, observer 'maxabs', model '{A[:12]}')"
    assert repr(measurements) == text == str(measurements)
