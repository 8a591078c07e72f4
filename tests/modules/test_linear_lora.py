"""LoRA adapters of peft on FP8 layers: they are put on as on the originals, and get the gradients that autograd gives
beside the dequantized weights."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_models import tiny_moe
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, FP8NotAvailableError, convert, dequantize
from optimum_fp8.formats import is_fp8
from optimum_fp8.modules import FP8Linear, fp8_modules

WEIGHT_ONLY = {"activation_scheme": "weight_only", "quantize_embeddings": True, "quantize_lm_head": True}

MODELS = {
    "Linear": (lambda: nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8)), lambda: torch.randn(5, 24)),
    "Conv1D": (lambda: nn.Sequential(Conv1D(16, 24), nn.Tanh(), Conv1D(8, 16)), lambda: torch.randn(5, 24)),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Conv1d(8, 4, 1)), lambda: torch.randn(2, 4, 9)),
    "Conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)),
        lambda: torch.randn(2, 4, 9, 9),
    ),
    "Embedding": (
        lambda: nn.Sequential(nn.Embedding(16, 8), nn.Tanh(), nn.Linear(8, 4)),
        lambda: torch.arange(8).view(2, 4),
    ),
}


def adapted(model: nn.Module, targets=("0", "2")):
    torch.manual_seed(1)
    config = LoraConfig(target_modules=list(targets), r=4, init_lora_weights=False, fan_in_fan_out=False)
    return get_peft_model(model, config)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: module.codes.view(torch.uint8).clone() for name, module in fp8_modules(model).items()}
    assert found
    return found


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_beside_the_dequantized_weights(kind):
    make, inputs = MODELS[kind]
    model, x = convert(make(), FP8Config(**WEIGHT_ONLY)), inputs()
    plain, quantized = adapted(dequantize(copy.deepcopy(model))), adapted(model)
    assert type(plain.base_model.model[0]) is type(quantized.base_model.model[0])
    assert trainable(plain).keys() == trainable(quantized).keys()
    for each in (plain, quantized):
        each(x).square().sum().backward()
    for name, parameter in trainable(plain).items():
        torch.testing.assert_close(trainable(quantized)[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_base_stays_in_fp8_and_optimizers_pass_it_by():
    model = convert(
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), FP8Config(activation_scheme="dynamic")
    )
    base = sum(each.numel() * each.element_size() for each in model.parameters())
    assert base < 2 * 64 * 64 + 1024
    model = adapted(model)
    before, sizes = codes(model), sum(each.numel() for each in trainable(model).values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model(torch.randn(8, 64)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = codes(model)
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert sum(each["exp_avg"].numel() for each in optimizer.state.values()) == sizes
    held = sum(each.numel() * each.element_size() for each in model.parameters())
    assert held == base + 4 * sizes


def test_a_vision_transformer_takes_adapters_on_all_its_layers():
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = convert(ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=2)), FP8Config(**WEIGHT_ONLY))
    layers = [name for name, module in model.named_modules() if isinstance(module, FP8Linear)]
    model = get_peft_model(model, LoraConfig(target_modules=[*layers, "projection"], r=2, init_lora_weights=False))
    model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    gradients = trainable(model)
    assert len(gradients) == 2 * (len(layers) + 1) and all(each.grad.any() for each in gradients.values())


def moe():
    return convert(tiny_moe("mixtral"), FP8Config(activation_scheme="dynamic"))


def test_adapters_on_attention_train_through_fp8_experts():
    model = moe()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(each.grad.any() for each in trainable(model).values())


def test_adapters_on_stacks_of_experts_are_refused():
    config = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(moe(), config)
    with pytest.raises(FP8NotAvailableError, match=r"experts.down_proj: .*target_parameters"):
        model(input_ids=torch.arange(12).view(2, 6))


def test_prepare_model_for_kbit_training_leaves_fp8_parameters_alone():
    model = convert(tiny_moe("mixtral").to(torch.bfloat16), FP8Config(activation_scheme="dynamic"))
    dtypes = {name: each.dtype for name, each in model.named_parameters() if is_fp8(each.dtype) or "scale" in name}
    before = codes(model)
    model = prepare_model_for_kbit_training(model)
    assert {name: each.dtype for name, each in model.named_parameters() if name in dtypes} == dtypes
    assert all(torch.equal(codes(model)[name], each) for name, each in before.items()) and not trainable(model)
    assert model.model.norm.weight.dtype == torch.float32
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
