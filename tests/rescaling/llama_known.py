"""Llama's classes, looked into as quantizing does, which takes longer than the rest: forks need not do it again."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from optimum_fp8.modules.handler import find_all

with torch.device("meta"):  # no kernel runs, which could start threads
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    find_all(model)
    get_model_conversion_mapping(model)
