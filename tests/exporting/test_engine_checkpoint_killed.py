"""export, killed: the folder is whole or not there."""

from __future__ import annotations

import pytest
from exporting.conftest import wide_llama
from exporting.test_engine_checkpoint import contents
from kill_points import POINTS, kill_at_random_points

from optimum_fp8 import export


@pytest.mark.slow
def test_the_output_is_whole_or_not_there(quantized, tmp_path):
    _, folder = quantized(wide_llama(), "FP8_DYNAMIC")
    export(folder, tmp_path / "whole")
    tensors, config = contents(tmp_path / "whole")
    there = []

    def check(number):
        if (tmp_path / str(number)).exists():
            found = contents(tmp_path / str(number))
            assert found[1] == config and found[0].keys() == tensors.keys()
            there.append(number)
        else:
            export(folder, tmp_path / str(number))

    kill_at_random_points(lambda number: export(folder, tmp_path / str(number)), check)
    assert len(there) < POINTS
