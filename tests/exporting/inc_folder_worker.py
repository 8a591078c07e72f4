"""Runs in an environment that has INC: quantizes a model by folders that were written for it.

python inc_folder_worker.py MODEL IDS FOLDER…

MODEL is a Llama in high precision, IDS a file with `ids`. Logits go to FOLDER.safetensors, with the codes of the first
layer, `[in, out]`, and the number of layers in FP8.
"""

import json
import os
import sys

import torch
from neural_compressor.torch.quantization import FP8Config, convert
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ON_A_CPU = {"use_qdq": True}


def quantized(plain, folder):
    os.chdir(folder)
    with open("quant_config.json", encoding="utf-8") as file:
        said = json.load(file)
    with open("on_a_cpu.json", "w", encoding="utf-8") as file:
        json.dump({**said, **ON_A_CPU}, file)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, attn_implementation="eager")
    return convert(model.eval(), FP8Config.from_json_file("on_a_cpu.json"))


if __name__ == "__main__":
    plain, ids, *folders = sys.argv[1:]
    for folder in folders:
        model = quantized(plain, folder)
        with torch.no_grad():
            logits = model(load_file(ids)["ids"]).logits
        layers = [module for module in model.modules() if module.__class__.__name__ == "PatchedLinear"]
        first = model.model.layers[0].self_attn.q_proj
        made = {"logits": logits.contiguous(), "codes": first.weight.view(torch.uint8).contiguous()}
        save_file({**made, "layers": torch.tensor(len(layers))}, f"{folder}.safetensors")
