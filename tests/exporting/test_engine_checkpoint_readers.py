"""What others make of exported checkpoints: transformers with the oldest and the newest compressed-tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exporting.conftest import CALIBRATED_CACHE, wide_llama, wide_mixtral
from exporting.models_beyond_text import llava, vit

from optimum_fp8 import export

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
VERSIONS = ("0.17.0", "0.20.1")
READ = """
import json, sys, torch, transformers

assert "optimum_fp8" not in sys.modules
for folder in sys.argv[1:]:
    with open(folder + "/config.json") as file:
        cls = getattr(transformers, json.load(file)["architectures"][0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        torch.save(model.eval()(**torch.load(folder + ".batch")).logits.float(), folder + ".logits")
    with open(folder + ".json", "w") as file:
        json.dump({key: sorted(map(str, value)) for key, value in info.items()}, file)
"""
CHANNELS = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
BATCHES = {"LLaVA": llava, "ViT": vit}
WITHOUT_CONVOLUTIONS = {"modules_to_not_convert": ["embeddings"]}
OF_CACHES = ("k_scale", "v_scale", "q_scale")  # which transformers does not use
BLOCKS = {"down_proj": {"scale_method": "block_128"}}
CASES = {
    "FP8": (wide_llama, "FP8", {}, "compressed-tensors"),
    "Gaudi's method": (wide_llama, "FP8", {"scale_method": "maxabs_hw", "target": "cpu"}, "compressed-tensors"),
    "channels, static": (wide_llama, "FP8", {"scale_method": CHANNELS, "target": "cpu"}, "compressed-tensors"),
    "FP8_DYNAMIC": (wide_llama, "FP8_DYNAMIC", {}, "compressed-tensors"),
    "FP8_BLOCK": (wide_llama, "FP8_BLOCK", {}, "compressed-tensors"),
    "MXFP8": (wide_llama, "MXFP8", {}, "compressed-tensors"),
    "W8A16": (wide_llama, "W8A16", {}, "compressed-tensors"),
    "groups": (wide_llama, "FP8_DYNAMIC", {"overrides": BLOCKS}, "compressed-tensors"),
    "cache": (wide_llama, "FP8_DYNAMIC", {"kv_cache": True, "overrides": CALIBRATED_CACHE}, "compressed-tensors"),
    "cache by head": (wide_llama, "FP8", {"kv_cache": True, "attention_granularity": "head"}, "compressed-tensors"),
    "queries": (wide_llama, "FP8", {"kv_cache": True, "attention": True}, "compressed-tensors"),
    "tied head": (lambda: wide_llama(tie_word_embeddings=True), "FP8_DYNAMIC", {}, "compressed-tensors"),
    "LLaVA": (lambda: llava()[0], "FP8_DYNAMIC", WITHOUT_CONVOLUTIONS, "compressed-tensors"),
    "ViT": (lambda: vit()[0], "FP8_DYNAMIC", WITHOUT_CONVOLUTIONS, "compressed-tensors"),
    "experts": (wide_mixtral, "FP8_DYNAMIC", {}, "compressed-tensors"),
    "fp8 blocks": (wide_llama, "FP8_BLOCK", {}, "fp8"),
    "fp8 experts": (wide_mixtral, "FP8_BLOCK", {}, "fp8"),
    "fp8 MXFP8": (wide_llama, "MXFP8", {}, "fp8"),
}
EXACT = ("Gaudi's method", "MXFP8")  # scales are powers of two, so that it does not matter where products are rounded


def batch_of(name):
    torch.manual_seed(3)
    return BATCHES[name]()[1] if name in BATCHES else {"input_ids": torch.randint(0, 96, (2, 16))}


@pytest.fixture
def logits(quantized, tmp_path):
    """Of each case: the logits of the plain model and of ours, and the folder of the exported one."""
    found = {}
    for number, (name, (make, preset, options, format)) in enumerate(CASES.items()):
        torch.manual_seed(0)
        plain, batch = make().eval(), batch_of(name)
        ours, folder = quantized(plain, preset, name=f"native{number}", **options)
        with torch.no_grad():
            results = [model(**batch).logits.float() for model in (plain, ours)]
        without = ["p_scale", "output_scale"] if options.get("attention") else []
        found[name] = (*results, export(folder, tmp_path / f"exported{number}", format, without=without))
        torch.save(batch, f"{found[name][-1]}.batch")
    return found


def test_they_compute_what_we_do(logits):
    for version in VERSIONS:
        read_with(version, [folder for *_, folder in logits.values()])
        for name, (plain, ours, folder) in logits.items():
            theirs = torch.load(f"{folder}.logits")
            with open(f"{folder}.json", encoding="utf-8") as file:
                info = json.load(file)
            unknown = [key for key in info["unexpected_keys"] if not key.endswith(OF_CACHES)]
            assert not unknown and not info["missing_keys"] and not info["mismatched_keys"], (version, name, info)
            error, own_error = ((each - plain).norm() / plain.norm() for each in (theirs, ours))
            assert error < 1.25 * own_error, (version, name)
            assert torch.equal(theirs, ours) or name not in EXACT, (version, name)


def read_with(version, arguments):
    """Have transformers load folders and compute logits in a process that has this version of compressed-tensors."""
    place = ROOT / f".venv-compressed-tensors-{version}"
    subprocess.run(["make", "-s", f"{place.name}/.ready"], cwd=ROOT, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run([sys.executable, "-c", READ, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
