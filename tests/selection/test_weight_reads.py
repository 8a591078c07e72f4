"""Weights that code reads instead of calling their module stay in high precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from optimum_fp8 import FP8Config, convert, quantization_report
from optimum_fp8.selection.weight_reads import read_by_owner

DYNAMIC = FP8Config(activation_scheme="dynamic")


class Reader(nn.Module):
    """Reads the weights of `cast`, `multiplied` and `rows[1]`, the shape of `asked`, and calls `called`."""

    slow = False

    def __init__(self):
        super().__init__()
        self.cast, self.multiplied, self.asked, self.called, self.guarded = (nn.Linear(8, 8) for _ in range(5))
        self.rows = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        nn.init.zeros_(self.called.weight)

    def forward(self, x):
        x = self.cast(x.to(self.cast.weight.dtype)) + F.linear(x, self.multiplied.weight)
        x = x + F.linear(x, self.rows[1].weight.float())
        if self.slow and x.ndim > 1:
            x = x + F.linear(x, self.guarded.weight)
        return self.called(self.asked(self.guarded(x))).view(-1, self.asked.weight.shape[0])


class Inheriting(Reader):
    pass


@pytest.mark.parametrize("model", [Reader(), Inheriting()])
def test_reads_are_found_in_the_class_and_its_bases(model):
    assert read_by_owner(model) - {"rows"} == {"cast", "multiplied", "rows.0", "rows.1"}


def test_reads_in_branches_that_are_never_taken_do_not_count():
    model = Reader()
    model.slow = True
    assert "guarded" in read_by_owner(model)


def test_reads_from_further_out():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8))
            self.inner.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner[0](x.to(self.inner.proj.weight.dtype))

    assert read_by_owner(Outer()) == {"inner.proj"}


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
def test_the_converted_model_computes_what_it_should(scheme):
    model, x = Reader(), torch.randn(3, 8)
    model.called.weight.data.normal_()
    expected = model(x)
    convert(model, FP8Config(activation_scheme=scheme))
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.1
    assert not quantization_report(model).fallbacks


@pytest.mark.core
@torch.no_grad()
def test_transformer_layers_of_torch_in_their_fast_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    wrapped, x = nn.Sequential(model, nn.Linear(32, 32)), torch.randn(2, 5, 32)
    expected = wrapped(x)
    convert(wrapped, DYNAMIC)
    assert ((wrapped(x) - expected).norm() / expected.norm()).item() < 0.1


@torch.no_grad()
def test_mamba_multiplies_with_its_weights_and_still_runs():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    convert(model, DYNAMIC)
    assert ((model(ids).logits - expected).norm() / expected.norm()).item() < 0.1
    assert quantization_report(model).quantized


def test_bloom_reads_its_weights_only_when_asked_to():
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64))
    assert read_by_owner(model) == set()
    for module in model.modules():
        if hasattr(module, "slow_but_exact"):
            module.slow_but_exact = True
    assert "transformer.h.0.self_attention.dense" in read_by_owner(model)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_reparametrized_weights_are_left_alone(norm):
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    convert(model, DYNAMIC)
    reasons = {module.name: module.reason for module in quantization_report(model).modules}
    assert "parametrized" in reasons["0"] and torch.isfinite(model(torch.ones(1, 4))).all()
