"""DistributedDataParallel and FSDP2 take converted models; FP8 codes stay out of what rank 0 sends."""

from __future__ import annotations

import copy

import pytest
from ranks import succeed
from tiny_models import tiny_llama

from optimum_fp8 import FP8Config, convert, dequantize
from optimum_fp8.lifecycle.replicated import NamesOfCodes

WRAPPED = """
import copy
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tiny_models import tiny_llama
from optimum_fp8 import FP8Config, convert
from optimum_fp8.errors import FP8NotAvailableError, FP8StateError

dist.init_process_group("gloo")
torch.manual_seed(0)
model = convert(tiny_llama(), FP8Config(activation_scheme="dynamic"))
ids = torch.arange(8)[None]

class PeftModel(nn.Module):
    # The names that peft gives, and its way of passing on what it is asked for.
    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def forward(self, ids):
        return self.base_model.model(ids)

with torch.no_grad():
    expected = model(ids).logits
for wrap in (lambda model: model, PeftModel):
    if rank == 1:
        nn.init.zeros_(model.model.norm.weight)
    with torch.no_grad():
        assert torch.equal(DistributedDataParallel(wrap(model))(ids).logits, expected)

def gradient(model, norm):
    model.zero_grad()
    model(ids).logits.sum().backward()
    return norm.weight.grad

def sharded(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)

norm = model.model.norm
expected_gradient = gradient(model, norm).clone()
torch.testing.assert_close(gradient(DistributedDataParallel(model), norm), expected_gradient)

shards = sharded(copy.deepcopy(model))
with torch.no_grad():
    assert torch.equal(shards(ids).logits, expected)
torch.testing.assert_close(gradient(shards, shards.model.norm).full_tensor(), expected_gradient)

def refused(act, error, message):
    try:
        act()
    except error as raised:
        assert message in str(raised), raised
    else:
        raise AssertionError(message)

cast = sharded(copy.deepcopy(model), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
refused(lambda: cast(ids), FP8StateError, "leave out param_dtype of MixedPrecisionPolicy")
config = FP8Config(activation_scheme="dynamic")
refused(lambda: convert(sharded(tiny_llama()), config), FP8NotAvailableError, "quantize in one process")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_converted_models_over_gloo(tmp_path):
    succeed(WRAPPED, 2, tmp_path)


def test_names_are_those_that_there_are():
    model = convert(tiny_llama(), FP8Config(activation_scheme="dynamic"))
    names = set(model._ddp_params_and_buffers_to_ignore)
    codes = {name for name, parameter in model.named_parameters() if parameter.dtype.itemsize == 1}
    assert len(codes) > 6 and names == codes | {f"base_model.model.{name}" for name in codes}
    clone = copy.deepcopy(model)
    clone.model.layers[0] = type(clone.model.layers[0])(clone.config, 0)
    assert set(model._ddp_params_and_buffers_to_ignore) == names > set(clone._ddp_params_and_buffers_to_ignore)


def test_a_model_in_high_precision_has_none():
    model = dequantize(convert(tiny_llama(), FP8Config(activation_scheme="dynamic")))
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    dequantize(convert(model, FP8Config(activation_scheme="dynamic")))
    assert not isinstance(getattr(model, "_ddp_params_and_buffers_to_ignore", None), NamesOfCodes)
