"""Memory: one tensor at a time, and of the files only what is mapped."""

from __future__ import annotations

import json

import fresh
import pytest
import torch
from anonymous_memory import WATCHED
from hf.conftest import llama

from optimum_fp8.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec

MIB = 2**20

# In a process of its own; a thread samples RssAnon, because file-backed pages of the source do not count.
SCRIPT = (
    WATCHED
    + """
import json, sys
import torch
from optimum_fp8 import FP8Config, quantize_files

def quantize(folder, method, share):
    config = FP8Config(activation_scheme="dynamic", scale_method=method)
    quantize_files(folder, folder + "-fp8", config, share_scales=share, overwrite=True)

method, share = sys.argv[3], len(sys.argv) > 4
quantize(sys.argv[2], method, share)  # imports and pools are there before the measurement starts
with Watched() as memory:
    quantize(sys.argv[1], method, share)
print(json.dumps(memory.peak - memory.before))
"""
)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """300 MB of Llama in one file, written without having it in memory; the largest tensor has 11 million values."""
    folder = tmp_path_factory.mktemp("big")
    with torch.device("meta"):
        model = llama(hidden_size=2048, intermediate_size=5632, num_hidden_layers=3, vocab_size=2000)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    (folder / "config.json").write_text(text)
    specs = {name: TensorSpec(torch.bfloat16, tuple(each.shape)) for name, each in model.state_dict().items()}
    with SafetensorsWriter(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, (dtype, shape) in specs.items():
            writer.write(name, torch.randn(shape, dtype=dtype))
    assert (folder / "model.safetensors").stat().st_size > 280 * MIB
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tensors"),
    # A search makes three or four tensors of a weight.
    [(["maxabs_hw"], 1), (["maxabs_arbitrary", "share"], 1), (["act_maxabs_pow2_weights_pcs_opt_pow2"], 4)],
    ids=["by range", "shared", "search"],
)
def test_one_tensor_at_a_time(big, tmp_path, options, tensors):
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "small")
    result = fresh.TRANSFORMERS.run(SCRIPT, str(big), str(tmp_path / "small"), *options)
    largest = 2048 * 5632 * 2  # bytes in bfloat16
    grown, limit = int(result.splitlines()[-1]), tensors * largest + 32 * MIB
    assert grown < limit
    print(f"grown by {grown / MIB:.0f} MiB, limit {limit / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB")
