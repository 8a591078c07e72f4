"""save_pretrained and save, killed: what was there stays or is replaced, and nothing loads that is not whole."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hf.test_staged_saving import put_back
from kill_points import kill_at_random_points
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import optimum_fp8
from optimum_fp8 import FP8CheckpointError, FP8Config, convert

SIZES = {"one file": "1GB", "several": "300KB"}


def converted(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).bfloat16()
    return convert(model, FP8Config(activation_scheme="dynamic"))


def found_in(folder, models):
    """The name of the model that lies in a folder, or why none does; a mixture of several is an error."""
    try:
        state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    except (OSError, ValueError, FP8CheckpointError):
        return "does not load"
    for name, model in models.items():
        expected = model.state_dict()
        if all(torch.equal(each.view(torch.uint8), expected[key].view(torch.uint8)) for key, each in state.items()):
            return name
    raise AssertionError(f"{folder} loads, and is none of {list(models)}")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("save", ["save_pretrained", "save"])
def test_a_new_folder_is_whole_or_does_not_load(tmp_path, save, size):
    model, seen = converted(0), Counter()

    def act(number):
        if save == "save":
            optimum_fp8.save(model, tmp_path / str(number), max_shard_size=size)
        else:
            model.save_pretrained(tmp_path / str(number), max_shard_size=size)

    def check(number):
        seen[found_in(tmp_path / str(number), {"new": model})] += 1
        act(f"{number} again" if save == "save" and (tmp_path / str(number)).exists() else number)

    kill_at_random_points(act, check)
    assert seen["does not load"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_checkpoint_stays_or_is_replaced(tmp_path, size):
    models, folder, seen = {"old": converted(0), "new": converted(1)}, tmp_path / "fp8", Counter()
    models["old"].save_pretrained(folder, max_shard_size=size)

    def act(number):
        models["new"].save_pretrained(folder, max_shard_size=size)

    def check(number):
        found = found_in(folder, models)
        if found == "does not load":  # shards are away while names change
            assert size != SIZES["one file"]
            put_back(folder)
            assert found_in(folder, models) == "old"
        seen[found] += 1
        models["old"].save_pretrained(folder, max_shard_size=size)

    kill_at_random_points(act, check)
    assert seen["old"] > 0
