"""Ranges are measured in one process, and written where they can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, Measurements, convert, finalize_calibration, prepare
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError
from optimum_fp8.lifecycle.state import state_of


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_each_of_several_processes_refuses_to_measure(variable, monkeypatch):
    monkeypatch.setenv(variable, "4")
    untouched = model()
    with pytest.raises(FP8NotAvailableError, match="calibration in 4 processes at once"):
        prepare(untouched, FP8Config())
    assert state_of(untouched) is None and not untouched[0]._forward_pre_hooks
    convert(model(), FP8Config(activation_scheme="dynamic"))
    monkeypatch.setenv(variable, "1")
    prepare(model(), FP8Config())


def test_each_of_several_processes_refuses_to_write(monkeypatch, tmp_path):
    prefix = str(tmp_path / "ranges")
    measured = prepare(model(), FP8Config(dump_stats_path=prefix))
    measured(torch.ones(2, 16))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FP8NotAvailableError, match="write over the others' measurements"):
        finalize_calibration(measured)
    assert not Measurements.exist(prefix)


def test_a_path_that_cannot_be_written_loses_no_measurements(tmp_path):
    (tmp_path / "file").write_text("")
    config = FP8Config(dump_stats_path=str(tmp_path / "file" / "ranges"))
    with pytest.raises(FP8ConfigError, match=r"dump_stats_path=.*file' is not a folder"):
        prepare(model(), config.replace(mode="MEASURE"))
    measured = prepare(model(), config)
    measured(torch.ones(2, 16))
    with pytest.raises(FP8ConfigError, match=r"dump_stats_path=.*file' is not a folder"):
        finalize_calibration(measured)
    (tmp_path / "file").unlink()
    assert finalize_calibration(measured).range("0") == 1.0
