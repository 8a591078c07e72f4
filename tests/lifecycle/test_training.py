"""Quantization-aware training of models: steps, what a checkpoint holds, copies, processes, and the ways back."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import run_ranks
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, calibrate, convert, dequantize, ops, prepare, quantization_report
from optimum_fp8.errors import FP8ConfigError, FP8MeasurementError, FP8NotAvailableError, FP8StateError
from optimum_fp8.lifecycle import finish_training_step

IDS = torch.arange(3, 27).reshape(2, 12)


def config(**options):
    return FP8Config(**{"fake_quant": True, "target": "cpu", **options})


def two_layers(**options):
    torch.manual_seed(0)
    return prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), config(**options))


def step(model, optimizer=None, accumulate=1):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(accumulate):
        loss = model(input_ids=IDS, labels=IDS).loss if hasattr(model, "config") else model(torch.randn(8, 16)).mean()
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.core
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_model_is_trained_and_converted_to_what_it_was_in_evaluation(make):
    model = prepare(make().float(), config(scale_method="unit_scale", fp8_config="E5M2"))
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=1e-2), logits(model.eval())
    losses = []
    for _ in range(8):
        model.train()
        losses.append(model(input_ids=IDS, labels=IDS).loss.item())
        step(model, optimizer)
    assert losses[-1] < 0.8 * losses[0]
    with ops.backend("reference"):
        evaluated = logits(model.eval())
        assert torch.equal(logits(convert(model)), evaluated) and not torch.equal(evaluated, before)
    assert quantization_report(model).phase == "converted" and model.config.quantization_config.fake_quant is False


def test_the_report_tells_that_a_model_is_trained():
    model = two_layers()
    report = quantization_report(model)
    assert report.phase == "training" and {row.reason for row in report.modules} == {"training"}
    assert "state: training" in str(report)


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_recomputation_and_accumulation_count_once(options):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prepare(tiny_llama().float(), config(amax_history_len=3)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            step(model, optimizer, accumulate=2)
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    steps = {int(tensor) for name, tensor in found[0].items() if name.endswith("fake_quant.step")}
    assert steps == {4}


def test_steps_of_other_optimizers_and_of_other_models_do_not_count():
    model, other = two_layers(), two_layers()
    weights, biases = ([each for each in model.parameters() if (each.ndim > 1) is two] for two in (True, False))
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (weights, biases)]
    other(torch.randn(2, 16)).mean().backward()
    for _ in range(3):
        model(torch.randn(2, 16)).mean().backward()
        for optimizer in optimizers:  # two of one model are one step
            optimizer.step()
    assert int(model[0].fake_quant.step) == 3 and int(other[0].fake_quant.step) == 0
    model(torch.randn(2, 16))
    finish_training_step(model)
    finish_training_step(model)  # nothing was trained in between
    assert int(model[0].fake_quant.step) == 4
    with pytest.raises(FP8StateError, match="in no quantization-aware training"):
        finish_training_step(nn.Linear(2, 2))


def test_a_copy_is_trained_by_itself():
    model = two_layers(amax_history_len=2)
    step(model)
    clone = copy.deepcopy(model)
    step(clone)
    assert int(clone[0].fake_quant.step) == 2 and int(model[0].fake_quant.step) == 1
    assert not torch.equal(clone[0].weight, model[0].weight)
    x = torch.randn(3, 16)
    with torch.no_grad(), ops.backend("reference"):
        evaluated = clone.eval()(x)
        assert torch.equal(convert(clone)(x), evaluated)
    assert quantization_report(model).phase == "training"


def test_a_state_dict_brings_histories_and_frozen_scales_back():
    options = {"amax_history_len": 3, "freeze_scales_at": 2}
    model = two_layers(**options)
    for _ in range(2):
        step(model)
    model(torch.randn(2, 16))  # takes the scales that are frozen
    other = two_layers(**options)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 16)
    with torch.no_grad(), ops.backend("reference"):
        expected = model.eval()(x)
        assert torch.equal(other.eval()(x), expected)
    scales = model[0].fake_quant.frozen_scale("weight")
    assert scales is not None
    with torch.no_grad():
        for each in (model, other):
            each[0].weight.mul_(3)
    assert torch.equal(convert(other)[0].weight_scale, scales), "frozen scales are those of the FP8 model"
    assert torch.equal(convert(model)[0].codes.float(), other[0].codes.float())


@torch.no_grad()
def test_what_is_evaluated_follows_the_weights():
    model, x = two_layers(), torch.randn(3, 16)
    with torch.enable_grad():
        step(model)
    model.eval()
    first = model(x)
    assert torch.equal(model(x), first)
    model[0].weight.mul_(2)
    assert not torch.equal(model(x), first)
    model[0].weight = nn.Parameter(model[0].weight / 2)
    assert torch.equal(model(x), first)
    model.to(torch.bfloat16)
    with ops.backend("reference"):
        evaluated = model(x.bfloat16())
        assert torch.equal(convert(model)(x.bfloat16()), evaluated)


def test_tied_weights_stay_tied():
    model = prepare(tiny_llama(tie_word_embeddings=True).float(), config(quantize_lm_head=True)).train()
    step(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with ops.backend("reference"):
        evaluated = logits(model.eval())
        assert torch.equal(logits(convert(model)), evaluated)


def test_a_saved_model_is_a_plain_one_and_goes_on_in_training(tmp_path):
    model = prepare(tiny_llama().float(), config(amax_history_len=2)).train()
    step(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert not hasattr(plain.config, "quantization_config")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(amax_history_len=2))
    assert quantization_report(again).phase == "training" and not hasattr(again.config, "quantization_config")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    with ops.backend("reference"):
        evaluated = logits(model.eval())
        assert torch.equal(logits(again.eval()), evaluated)
        assert torch.equal(logits(convert(again)), evaluated)


def test_dequantize_ends_training():
    model = prepare(tiny_llama().float(), config()).train()
    step(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "fake_quant" not in name}
    dequantize(model)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert quantization_report(model).phase == "high precision"
    prepare(model, config())


def test_what_goes_on_in_training_says_so():
    model = two_layers()
    for action in (lambda: prepare(model, config()), lambda: calibrate(model), lambda: convert(model, FP8Config())):
        with pytest.raises(FP8StateError, match="quantization-aware training|prepared with another config"):
            action()
    with pytest.raises(FP8MeasurementError, match="2 modules have no range of their inputs.*: 0, 2: train the model"):
        convert(model)
    assert quantization_report(model).phase == "training", "an error leaves the model as it was"
    step(model)
    assert int(model[0].fake_quant.step) == 1
    with pytest.raises(FP8StateError, match="fake_quant=True is for models that are trained before"):
        convert(nn.Sequential(nn.Linear(4, 4)), config())


def test_an_error_of_a_conversion_leaves_the_model_in_training():
    model = two_layers()
    step(model)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        convert(model)
    with torch.no_grad():
        model[2].weight[0, 0] = 0.1
    step(model)
    assert int(model[0].fake_quant.step) == 2
    convert(model)


def test_a_kind_that_cannot_be_trained_is_named():
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8), "head": nn.Linear(8, 8)})
    with pytest.raises(FP8NotAvailableError, match="rnn: fake_quant=True cannot train 'recurrent' modules"):
        prepare(model, config())
    prepare(model, config(blocklist={"names": ["rnn"]}))
    for options in ({"attention": True}, {"kv_cache": True}):
        with pytest.raises(FP8ConfigError, match="fake_quant=True trains layers alone"):
            config(**options)


@pytest.mark.slow
def test_torch_compile():
    model, x = two_layers(amax_history_len=2), torch.randn(4, 16)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    for each in (model, compiled):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    expected, found = model.state_dict(), compiled._orig_mod.state_dict()
    assert int(found["0.fake_quant.step"]) == 3
    assert all(torch.allclose(found[name], expected[name]) for name in expected)


_DDP = """
import torch, torch.distributed as dist
from torch import nn
from optimum_fp8 import FP8Config, convert, prepare
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
prepare(model, FP8Config(fake_quant=True, target="cpu", amax_history_len=2))
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
for number in range(3):
    x = torch.full((2, 16), 1.0 + number + 10 * rank)
    with wrapped.no_sync():
        wrapped(x).mean().backward()
    wrapped(x / 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(model[0].fake_quant.amax_history[:, 0].tolist(), int(model[0].fake_quant.step))
convert(model)
print([float(layer.input_scale) for layer in model], [layer.codes.float().sum().item() for layer in model])
"""

_FSDP = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from optimum_fp8 import FP8Config, convert, ops, prepare
from optimum_fp8.errors import FP8NotAvailableError
dist.init_process_group("gloo")
def make():
    torch.manual_seed(0)
    config = FP8Config(fake_quant=True, target="cpu", amax_history_len=2, freeze_scales_at=2)
    return prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), config)
def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(3):
        model(torch.full((2, 16), 1.0 + number)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), ops.backend("reference"):
        return model.eval()(torch.ones(1, 16))
plain, sharded = make(), make()
for layer in sharded:
    fully_shard(layer)
fully_shard(sharded)
expected, found = train(plain), train(sharded)
assert torch.equal(expected, found), (expected, found)
state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
try:
    convert(sharded)
except FP8NotAvailableError as error:
    print(error)
"""


@pytest.mark.slow
def test_processes_agree_on_ranges(tmp_path):
    """The largest of all processes counts, also that of a batch whose gradients are accumulated."""
    first, second = run_ranks(_DDP, 2, tmp_path)
    assert first.status == second.status == 0, first.output + second.output
    assert first.output == second.output
    assert first.output.splitlines()[0] == "[-1.0, 13.0, 12.0] 3"


@pytest.mark.slow
def test_sharded_weights_are_trained_as_whole_ones(tmp_path):
    for each in run_ranks(_FSDP, 2, tmp_path):
        assert each.status == 0, each.output
        assert "convert: the weights of this model are spread over processes: save it" in each.output
