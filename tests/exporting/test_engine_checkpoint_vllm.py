"""What vLLM on a CPU makes of exported checkpoints, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from exporting.conftest import CALIBRATED_CACHE, wide_llama, wide_mixtral

from optimum_fp8 import export

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
ROOT = Path(__file__).parents[2]
TOLERANCE = 0.05  # of logarithmic probabilities: vLLM computes in bfloat16
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "",
}
CACHE = {"kv_cache": True, "overrides": CALIBRATED_CACHE}
# What its kernels for CPUs compute; it has none for inputs with calibrated scales, nor for experts in FP8.
RUN = {
    "dynamic": (wide_llama, "FP8_DYNAMIC", {}, "compressed-tensors"),
    "dynamic, a cache": (wide_llama, "FP8_DYNAMIC", CACHE, "compressed-tensors"),
    "dynamic, a tied head": (lambda: wide_llama(tie_word_embeddings=True), "FP8_DYNAMIC", {}, "compressed-tensors"),
    "dynamic, shards": (wide_llama, "FP8_DYNAMIC", {}, "compressed-tensors"),
    "modelopt, dynamic": (wide_llama, "FP8_DYNAMIC", {}, "modelopt"),
    "modelopt, dynamic, a cache": (wide_llama, "FP8_DYNAMIC", CACHE, "modelopt"),
}
BY_HEAD = {"kv_cache": True, "attention_granularity": "head"}
# Models with experts come first: in one process, vLLM prepares itself for them only at the start.
LOADED = {
    "experts": (wide_mixtral, "FP8_DYNAMIC", {}, "compressed-tensors"),
    "modelopt, experts": (wide_mixtral, "FP8", {}, "modelopt"),
    "static": (wide_llama, "FP8", {}, "compressed-tensors"),
    "static, a cache": (wide_llama, "FP8", {"kv_cache": True}, "compressed-tensors"),
    "static, queries and a cache": (wide_llama, "FP8", {"kv_cache": True, "attention": True}, "compressed-tensors"),
    "static, a cache by head": (wide_llama, "FP8", BY_HEAD, "compressed-tensors"),
    "modelopt, static, a cache": (wide_llama, "FP8", {"kv_cache": True}, "modelopt"),
}
NO_KERNEL = ("static_scaled_fp8_quant", "silu_and_mul_quant", "FP8 MoE backend")


def logprobs_of(model, ids):
    with torch.no_grad():
        found = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
    return found.gather(1, ids[1:, None])[:, 0]


def test_vllm_computes_what_we_do_and_loads_the_rest(quantized, tmp_path):
    ids, expected, folders = torch.randint(0, 96, (32,)), {}, {}
    for number, (name, (make, preset, options, format)) in enumerate((LOADED | RUN).items()):
        model, folder = quantized(make(), preset, name=f"native{number}", **options)
        if name.endswith("shards"):
            model.save_pretrained(folder := tmp_path / "shards", max_shard_size="300KB")
        without = ["p_scale", "output_scale"] if options.get("attention") else []
        expected[name] = logprobs_of(model, ids)
        folders[name] = export(folder, tmp_path / f"exported{number}", format, without=without)
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    results = of_vllm(tmp_path, list(folders.values()))
    for name, folder in folders.items():
        found = results[folder]
        assert found["loaded"], (name, found)
        if name in LOADED:
            assert any(lacking in found["error"] for lacking in NO_KERNEL), (name, found)
            continue
        assert "error" not in found and found["generated"] == 2, (name, found)
        assert found["cache"].startswith("fp8" if "cache" in name else "auto"), (name, found)
        assert (torch.tensor(found["logprobs"]) - expected[name]).abs().max() < TOLERANCE, name


def of_vllm(tmp_path, folders):
    subprocess.run(["make", "-s", ".venv-vllm/.ready"], cwd=ROOT, check=True, capture_output=True)
    arguments = [str(tmp_path / "ids.json"), str(tmp_path / "results.json"), *folders]
    command = [ROOT / ".venv-vllm" / "bin" / "python", Path(__file__).with_name("vllm_worker.py"), *arguments]
    done = subprocess.run(command, env={**os.environ, **VLLM}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "results.json").read_text())
