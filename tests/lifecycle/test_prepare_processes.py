"""Processes that should be there, and places where ranges can be written."""

from __future__ import annotations

import pytest
import torch
from accelerate import PartialState
from torch import nn

from optimum_fp8 import FP8Config, convert, finalize_calibration, prepare
from optimum_fp8.errors import FP8CalibrationError, FP8ConfigError
from optimum_fp8.lifecycle.state import state_of


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_other_processes_that_cannot_be_reached(variable, monkeypatch):
    PartialState(cpu=True)  # made before, for this process alone
    monkeypatch.setenv(variable, "4")
    untouched = model()
    with pytest.raises(FP8CalibrationError, match="one of 4 processes, .* cannot be reached .*without a launcher"):
        prepare(untouched, FP8Config())
    assert state_of(untouched) is None and not untouched[0]._forward_pre_hooks
    convert(model(), FP8Config(activation_scheme="dynamic"))
    monkeypatch.setenv(variable, "1")
    prepare(model(), FP8Config())


def test_a_process_that_is_alone_in_its_group_measures(tmp_path):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        measured = prepare(model(), FP8Config(dump_stats_path=str(tmp_path / "ranges")))
        measured(torch.ones(2, 16))
        assert finalize_calibration(measured).range("0") == 1.0
    finally:
        torch.distributed.destroy_process_group()


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
