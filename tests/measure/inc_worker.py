"""Runs in an environment that has INC: quantizes models with measurements that were written for it.

    python inc_worker.py FOLDER METHOD…

FOLDER has a sub-folder for each model: `config.json` for a Llama, else a Sequential; `model.safetensors`,
`inputs.safetensors` and the measurements `stats/<method>/m_hooks_maxabs.npz`. What INC computes goes to
`<method>.safetensors` beside them.
"""

import os
import sys

import torch
from neural_compressor.torch.quantization import FP8Config, convert
from safetensors.torch import load_file, save_file
from torch import nn


def model_of(folder):
    if os.path.exists(os.path.join(folder, "config.json")):
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False)).bfloat16()
    model.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
    return model


def quantized(folder, method):
    config = FP8Config(
        mode="QUANTIZE",
        dump_stats_path=os.path.join(folder, "stats", method, "m"),
        scale_method=method,
        use_qdq=True,
        allowlist={"types": ["Linear"], "names": []},
        blocklist={"types": [], "names": ["lm_head"]},
    )
    return convert(model_of(folder).eval(), config)


if __name__ == "__main__":
    root, *methods = sys.argv[1:]
    for name in sorted(os.listdir(root)):
        folder = os.path.join(root, name)
        inputs = load_file(os.path.join(folder, "inputs.safetensors"))["x"]
        for method in methods:
            with torch.no_grad():
                output = quantized(folder, method)(inputs)
            output = getattr(output, "logits", output)
            save_file({"y": output.contiguous()}, os.path.join(folder, f"{method}.safetensors"))
