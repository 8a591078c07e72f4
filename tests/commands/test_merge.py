"""`optimum-cli fp8 merge`: several files become one."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from optimum.commands.register.register_fp8 import FP8MergeCommand

from optimum_fp8 import Measurements
from optimum_fp8.commands.merge import main

INC = Path(__file__).parents[1] / "data" / "inc"


@pytest.fixture
def run(capsys):
    def run(*arguments: object):
        parser = ArgumentParser()
        FP8MergeCommand.parse_args(parser)
        status = main(parser.parse_args([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def measured(prefix, value, fingerprint="a" * 32):
    measurements = Measurements(fingerprint, samples=2, data=f"d{value}")
    measurements.observe("fc", "input", torch.full((3,), value))
    return measurements.save(prefix)


@pytest.mark.core
def test_any_number_of_files(tmp_path, run):
    paths = [measured(tmp_path / f"m{value}", float(value)) for value in (1, 5, 3)]
    first = paths[0].removesuffix("_measurements.safetensors")
    status, out, err = run(first, *paths[1:], "--output", tmp_path / "all")
    assert status == 0 and "1 tensors, 6 samples of 3 files" in out, err
    merged = Measurements.load(tmp_path / "all")
    assert merged.range("fc").item() == 5.0 and merged.samples == 6
    assert merged.tensors["fc", "input"].statistics()["count"].item() == 9


def test_the_file_that_does_not_fit_is_named(tmp_path, run):
    for name, fingerprint in (("a", "a"), ("b", "a"), ("c", "c")):
        measured(tmp_path / name, 1.0, fingerprint * 32)
    status, _, err = run(*(tmp_path / name for name in "abc"), "--output", tmp_path / "all")
    assert status == 1 and err.startswith(
        f"error: {tmp_path}/c does not go with {tmp_path}/a: measurements of different"
    )
    status, _, err = run(tmp_path / "a", tmp_path / "none", "--output", tmp_path / "all")
    assert status == 1 and f"no measurements at {tmp_path}/none: expected what was --output" in err
    assert not (tmp_path / "all_measurements.safetensors").exists()


def test_nothing_is_overwritten_unless_told(tmp_path, run):
    measured(tmp_path / "a", 1.0), measured(tmp_path / "b", 2.0)
    status, _, err = run(tmp_path / "b", "--output", tmp_path / "a")
    assert status == 1 and "--overwrite" in err and Measurements.load(tmp_path / "a").range("fc").item() == 1.0
    assert run(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "a", "--overwrite")[0] == 0
    assert Measurements.load(tmp_path / "a").range("fc").item() == 2.0


def test_incs_files_are_of_one_model_where_their_weights_are(tmp_path, run):
    same = INC / "measurements" / "with_outputs_measure_exclude_NONE"
    assert run(INC / "measured", same, "--output", tmp_path / "all")[0] == 0
    other = Measurements.load(same)
    other.observe("0", "weight", torch.full((2,), 9.0))
    other.save(tmp_path / "other")
    status, _, err = run(INC / "measured", tmp_path / "other", "--output", tmp_path / "all", "--overwrite")
    assert status == 1 and "other does not go with" in err and "the weight of 0 has 9 and 0.353516" in err
