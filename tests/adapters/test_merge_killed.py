"""merge_lora, killed: the folder is whole or not there, and the checkpoint it is made of is as it was."""

from __future__ import annotations

import pytest
from adapters.conftest import llama
from adapters.test_merge import assert_equal, tensors
from kill_points import POINTS, kill_at_random_points

from optimum_fp8 import merge_lora


@pytest.mark.slow
def test_the_output_is_whole_or_not_there(save, adapt, quantized, tmp_path):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original)
    before = (fp8 / "model.safetensors").read_bytes()
    merge_lora(fp8, adapter, tmp_path / "whole", trained_on="base")
    expected, there = tensors(tmp_path / "whole"), []

    def act(number):
        merge_lora(fp8, adapter, tmp_path / str(number), trained_on="base")

    def check(number):
        if (tmp_path / str(number)).exists():
            assert (tmp_path / str(number) / "config.json").is_file()
            there.append(number)
        else:
            act(number)
        assert_equal(tensors(tmp_path / str(number)), expected)

    kill_at_random_points(act, check)
    assert len(there) < POINTS and (fp8 / "model.safetensors").read_bytes() == before
