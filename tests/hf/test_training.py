"""Full fine-tuning of a converted model is refused in its first backward pass; what is meant goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_fp8 import FP8Config, FP8StateError, convert, dequantize

IDS = torch.arange(12).view(2, 6)
SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
REFUSED = (
    r"weights in FP8 get no gradient.*get_peft_model.*fake_quant=True.*dequantize\(model\).*requires_grad_\(False\)"
)


def converted():
    torch.manual_seed(0)
    return convert(LlamaForCausalLM(LlamaConfig(**SIZES)), FP8Config(activation_scheme="dynamic")).train()


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("of", ["loss", "logits", "tuple", "base model"])
def test_full_fine_tuning_is_refused(of):
    model = converted()
    if of == "base model":
        loss = model.model(input_ids=IDS).last_hidden_state.sum()
    elif of == "tuple":
        loss = model(input_ids=IDS, return_dict=False)[0].sum()
    else:
        loss = loss_of(model) if of == "loss" else model(input_ids=IDS).logits.sum()
    with pytest.raises(FP8StateError, match=REFUSED):
        loss.backward()


def test_copies_and_loaded_models_refuse_it_too(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path)
    for each in (copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(tmp_path).train()):
        with pytest.raises(FP8StateError, match=REFUSED):
            loss_of(each).backward()


def adapters(model):
    return get_peft_model(model, LoraConfig(target_modules="all-linear"))


def norms_alone(model):
    for name, parameter in model.named_parameters():
        if "embed" in name or "head" in name:
            parameter.requires_grad_(False)
    return model


def a_head(model):
    model.model.requires_grad_(False)
    return model


MEANT = {"adapters": adapters, "norms alone": norms_alone, "a head": a_head, "dequantized": dequantize}


@pytest.mark.parametrize("way", MEANT)
def test_what_is_meant_goes_on(way):
    model = MEANT[way](converted())
    loss_of(model).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert not [key for key in vars(model) if "refuses" in key] or way != "dequantized"


def test_inference_in_training_mode_and_gradients_in_inference_mode_go_on():
    model = converted()
    with torch.no_grad():
        assert loss_of(model).isfinite()
    assert loss_of(model).isfinite()  # no backward pass
    loss_of(model.eval()).backward()  # of norms, as saliency does
