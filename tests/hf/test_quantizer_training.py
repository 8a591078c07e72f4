"""What is around FP8 modules is trained as in high precision, whatever trains it; FP8 weights themselves are not."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from hf.conftest import llama
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_fp8 import FP8Config, convert
from optimum_fp8.errors import FP8NotAvailableError, FP8StateError
from optimum_fp8.formats import is_fp8

IDS = torch.arange(3, 19).view(2, 8)


class Adapter(nn.Module):
    """A small product of low rank beside a layer, as LoRA adds it."""

    def __init__(self, base: nn.Module, width: int):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.fixture
def model(save):
    """A converted model with adapters, of which nothing else is trained."""
    config = FP8Config(activation_scheme="dynamic")
    model = AutoModelForCausalLM.from_pretrained(save(llama(), torch.float32), quantization_config=config)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj, model.config.hidden_size)
    return model.train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainable(model)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert expected.abs().max() > 0 and torch.equal(gradients(model), expected)


def test_the_scaler_of_fp16(model):
    optimizer, scaler = torch.optim.SGD(trainable(model), lr=1.0), torch.amp.GradScaler("cpu", init_scale=64.0)
    expected = gradients(model)
    optimizer.zero_grad()
    before = torch.cat([parameter.detach().flatten() for parameter in trainable(model)])
    with torch.autocast("cpu", torch.float16):
        loss = model(IDS, labels=IDS).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    scaler.step(optimizer)
    moved = before - torch.cat([parameter.detach().flatten() for parameter in trainable(model)])
    assert nn.functional.cosine_similarity(moved, expected, dim=0) > 0.99


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_of_accelerate_and_trainer(model, precision, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    codes = [parameter.clone() for parameter in model.parameters() if is_fp8(parameter.dtype)]
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    first, last = (step(accelerator, prepared, optimizer) for _ in range(2))
    assert last < first
    AcceleratorState._reset_state(True)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", precision: True}
    assert Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows).train().training_loss > 0
    after = [parameter for parameter in model.parameters() if is_fp8(parameter.dtype)]
    assert all(map(torch.equal, codes, after))
    AcceleratorState._reset_state(True)


def step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = model(IDS, labels=IDS).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_is_given_all_parameters_leaves_those_in_fp8_alone(model, optimizer):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer(model.parameters(), lr=0.1, weight_decay=0.5)  # made, and never used, it changes nothing
    runs = optimizer(model.parameters(), lr=0.1, weight_decay=0.5)
    model(IDS, labels=IDS).loss.backward()
    runs.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("q_proj.up" in name or "q_proj.down" in name for name in changed)


def test_a_gradient_for_weights_in_fp8_is_refused():
    model = convert(nn.Sequential(nn.Linear(16, 8)), FP8Config(activation_scheme="dynamic"))
    x = torch.randn(2, 16)
    expected = model(x)
    model.requires_grad_(True)
    with pytest.raises(FP8StateError, match="0: .*requires_grad=True.*adapters.*dequantize"):
        model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    model[0].codes.requires_grad_(False)
    model(x).sum().backward()
    assert model[0].bias.grad is not None and model[0].codes.grad is None


def test_casts_reach_what_is_in_high_precision_only(model):
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()
    layers = convert(nn.Sequential(nn.Linear(16, 8)), FP8Config(activation_scheme="dynamic"))
    layers.half()
    assert layers[0].codes.dtype is torch.float8_e4m3fn and layers[0].weight_scale.dtype is torch.float32
    y = layers(torch.randn(2, 16).half())
    y.sum().backward()
    assert y.dtype is layers[0].bias.grad.dtype is torch.float16


def test_pruning_and_parametrizing_are_refused(model):
    layer = model.model.layers[0].mlp.up_proj
    for act in (
        lambda: prune.l1_unstructured(layer, "weight", 0.5),
        lambda: nn.utils.parametrizations.weight_norm(layer),
    ):
        with pytest.raises(FP8NotAvailableError, match="cannot be pruned, reparametrized.*original model"):
            act()
