"""Memory while a model of more than 2 GB is calibrated block by block, and saved: that of two blocks, no more."""

from __future__ import annotations

import json

import fresh
import pytest
import torch
from anonymous_memory import WATCHED
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20
LAYERS = 10

# Loads in a process of its own; a thread samples RssAnon, because file-backed pages do not count.
SCRIPT = (
    WATCHED
    + """
import json, sys, time
import torch, optimum_fp8
from transformers import AutoModelForCausalLM
from optimum_fp8 import FP8Config

batches = [{"input_ids": torch.randint(0, 1024, (1, 32))} for _ in range(2)]
config = FP8Config(
    dataset=batches, calibration="sequential", calibration_inputs=sys.argv[3], dump_stats_path=sys.argv[2] + "/ranges/x"
)
with Watched() as memory:
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, quantization_config=config)
    loaded, seconds = memory.peak, time.monotonic() - began
    model.save_pretrained(sys.argv[2] + "/out")
print(json.dumps({"start": memory.before, "peak": memory.peak, "loaded": loaded, "seconds": seconds}))
"""
)


@pytest.fixture
def large(tmp_path):
    """A Llama in float32, of which each layer is the same and has a file of its own; its folder, and a layer's size."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=1024,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items() if ".layers." not in name}
    layer = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items() if ".layers.0." in name}
    folder = tmp_path / "large"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    files = {"rest.safetensors": tensors}
    files |= {
        f"layer-{n}.safetensors": {name.replace(".0.", f".{n}."): tensor for name, tensor in layer.items()}
        for n in range(LAYERS)
    }
    for file, content in files.items():
        save_file(content, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, content in files.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 2e9
    yield str(folder), sum(tensor.nbytes for tensor in layer.values())
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()


@pytest.mark.slow
def test_peak_of_a_large_model(large, tmp_path):
    folder, block = large
    found = json.loads(fresh.TRANSFORMERS.run(SCRIPT, folder, str(tmp_path), "disk").splitlines()[-1])
    limit = 2 * block + 300 * MIB  # of all that the process has, imports included
    told = {name: f"{found[name] / MIB:.0f} MiB" for name in ("start", "loaded", "peak")}
    print(f"{told}, limit {limit / MIB:.0f} MiB, {found['seconds']:.0f} s")
    assert found["peak"] <= limit, told
    assert found["peak"] - found["start"] <= block / 2, "what is made of one weight, and a batch: not even a block"
    assert not (tmp_path / "work").exists()
