"""Every mutation of a checkpoint is caught when it is loaded, or by verify, and told by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_mutations import Mutation, of_config, of_files, of_tensors
from moe_models import tiny_moe
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, convert, prepare, verify
from optimum_fp8.errors import FP8Error

SHARDS, LEAST, PARTS = "30KB", 500, 8
# What transformers reads, and fails over, before it asks any quantizer.
BEFORE_US = {
    *("dtype", "head_dim", "hidden_act", "model_type", "sliding_window", "weight_map"),
    *("quantization_config", "quant_method"),
}


def made(folder: Path, seed: int) -> Path:
    """A folder with a model of experts in FP8: static scales, attention and cache, in several files."""
    torch.manual_seed(seed)
    model = tiny_moe("mixtral").to(torch.bfloat16)
    config = FP8Config(activation_scheme="static", target="cpu", attention=True, kv_cache=True)
    ids = torch.randint(0, 64, (4, 24))
    model = prepare(model, config)
    with torch.no_grad():
        model(ids)
        model.generate(ids[:1, :4], max_new_tokens=2, do_sample=False)
    convert(model).save_pretrained(folder, max_shard_size=SHARDS)
    return folder


def outcome(mutation: Mutation, folder: Path) -> str:
    """Who catches a mutation: "load", "verify", or what went wrong."""
    where = mutation.where.split()[0]  # of "file key" the file
    foreign = None
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        loaded = "loads"
    except FP8Error as error:
        loaded = "load" if where in str(error) else f"another name: {str(error)[:200]}"
    except Exception as error:
        loaded, foreign = "foreign", f"{type(error).__name__}: {str(error)[:160]}"
    if loaded == "load":
        return "load"
    try:
        findings = [str(each) for each in verify(folder)]
    except Exception as error:
        return f"verify fails: {type(error).__name__}: {str(error)[:200]}"
    if not any(where in each for each in findings):
        return f"not told ({loaded}, {foreign}): {findings[:2]}"
    return f"verify, and foreign words: {foreign}" if foreign and where not in BEFORE_US else "verify"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutations")
    return made(folder / "one", 0), made(folder / "other", 1)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))  # for several processes
def test_every_mutation_is_told_by_its_name(checkpoints, tmp_path, part):
    folder, other = checkpoints
    assert [str(each) for each in verify(folder)] == []
    mutations = [*of_tensors(folder), *of_config(folder), *of_files(folder, other)]
    assert len(mutations) >= LEAST
    found = []
    for mutation in mutations[part::PARTS]:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        mutation.change(copy)
        if (result := outcome(mutation, copy)) not in ("load", "verify"):
            found.append(f"{mutation}: {result}")
        shutil.rmtree(copy)
    assert found == []
