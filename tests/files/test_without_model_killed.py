"""quantize_files, killed: the output is whole or not there, and the same call goes on."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
from hf.test_staged_saving_killed import found_in
from kill_points import kill_at_random_points
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_fp8 import FP8Config, quantize_files


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_the_output_is_whole_or_as_it_was(tmp_path, replaced):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).bfloat16().save_pretrained(tmp_path / "plain")
    output, seen = tmp_path / "fp8", Counter()
    config, before = FP8Config(activation_scheme="dynamic"), FP8Config.preset("W8A16")
    models = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=each)
        for name, each in {"new": config, "old": before}.items()
    }

    def act(number):
        quantize_files(tmp_path / "plain", output, config, max_shard_size="300KB", overwrite=True)

    def check(number):
        seen[found_in(output, models)] += 1
        act(number)  # goes on
        assert found_in(output, models) == "new" and not (tmp_path / "fp8.partial").exists()
        restore()

    def restore():
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(tmp_path / "fp8.partial", ignore_errors=True)
        if replaced:
            quantize_files(tmp_path / "plain", output, before)

    restore()
    kill_at_random_points(act, check)
    assert seen["old" if replaced else "does not load"] > 0
    assert not replaced or seen["does not load"] == 0
