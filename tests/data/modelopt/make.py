"""Writes `exports.json`: what NVIDIA's ModelOpt itself makes of small models, as names, dtypes and shapes.

python make.py      # with nvidia-modelopt 0.47.0, transformers 5.24 and torch 2.13 on a CPU
"""

import copy
import json
import tempfile
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SIZES, **HEADS, architectures=["LlamaForCausalLM"])
MIXTRAL = MixtralConfig(
    **SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2, architectures=["MixtralForCausalLM"]
)


def with_rules(config, *rules):
    return {**copy.deepcopy(config), "quant_cfg": [*copy.deepcopy(config["quant_cfg"]), *rules]}


def rules_for(config, names):
    """What a configuration says of weights and inputs, for the layers `names` alone."""
    kinds = ("weight_quantizer", "input_quantizer")
    found = {kind: each for kind in kinds for each in config["quant_cfg"] if each["quantizer_name"] == f"*{kind}"}
    return [{**copy.deepcopy(each), "quantizer_name": f"*{names}*{kind}"} for kind, each in found.items()]


CASES = {
    "FP8": (LlamaForCausalLM, LLAMA, mtq.FP8_DEFAULT_CFG),
    "FP8 and a cache": (LlamaForCausalLM, LLAMA, with_rules(mtq.FP8_DEFAULT_CFG, *mtq.FP8_KV_CFG["quant_cfg"])),
    "FP8_DYNAMIC": (LlamaForCausalLM, LLAMA, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG),
    "FP8_BLOCK": (LlamaForCausalLM, LLAMA, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG),
    "MXFP8": (LlamaForCausalLM, LLAMA, mtq.MXFP8_DEFAULT_CFG),
    "mixed": (
        LlamaForCausalLM,
        LLAMA,
        with_rules(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, *rules_for(mtq.MXFP8_DEFAULT_CFG, "down_proj")),
    ),
    "experts": (MixtralForCausalLM, MIXTRAL, mtq.FP8_DEFAULT_CFG),
}


def export(cls, config, scheme):
    torch.manual_seed(0)
    model = mtq.quantize(
        cls(copy.deepcopy(config)).bfloat16(), scheme, lambda each: each(torch.randint(0, 96, (4, 16)))
    )
    with tempfile.TemporaryDirectory() as folder:
        export_hf_checkpoint(model, export_dir=folder)
        found = {key: tensor for path in Path(folder).glob("*.safetensors") for key, tensor in load_file(path).items()}
        return {
            "config": json.loads(Path(folder, "config.json").read_text())["quantization_config"],
            "hf_quant_config": json.loads(Path(folder, "hf_quant_config.json").read_text()),
            "tensors": {key: [str(each.dtype), list(each.shape)] for key, each in sorted(found.items())},
        }


if __name__ == "__main__":
    made = {name: export(*case) for name, case in CASES.items()}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in made.items())
    Path(__file__).with_name("exports.json").write_text(f"{{\n{lines}\n}}\n")
