"""Weights that code reads instead of calling their module stay in high precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.selection.weight_reads import read_by_owner

DYNAMIC = FP8Config(activation_scheme="dynamic")


class Reader(nn.Module):
    """Multiplies by the weights of `multiplied` and `rows[1]`, asks for those of `cast` and `asked`, calls `called`."""

    slow = False

    def __init__(self):
        super().__init__()
        self.cast, self.multiplied, self.asked, self.called, self.guarded = (nn.Linear(8, 8) for _ in range(5))
        self.rows = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.reset()

    def reset(self):
        self.called.weight.data.normal_()

    def fuse(self):
        return torch.cat([self.called.weight, self.asked.weight])

    def forward(self, x):
        if isinstance(self.cast.weight, torch.Tensor) and x.dtype != self.cast.weight.dtype:
            x = x.to(self.cast.weight.dtype)
        x = self.cast(x) + self.product(x)
        if self.slow:
            x = x + F.linear(x, self.guarded.weight)
        if x.shape[0] > 100:
            return F.linear(x, self.called.weight)
        return self.called(self.asked(self.guarded(x))).view(-1, self.asked.weight.shape[0])

    def product(self, x):
        return F.linear(x, self.multiplied.weight) + F.linear(x, self.rows[1].weight.float())


class Inheriting(Reader):
    pass


class Overriding(Reader):
    def product(self, x):
        return x


class Both(nn.Module):
    """Multiplies in either branch."""

    def __init__(self):
        super().__init__()
        self.always, self.once = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.always.weight if x.ndim > 2 else self.once(F.linear(x, self.always.weight))


@pytest.mark.parametrize("model", [Reader(), Inheriting()])
def test_what_every_forward_multiplies_by_is_found_in_the_class_and_its_bases(model):
    assert read_by_owner(model) - {"rows"} == {"multiplied", "rows.0", "rows.1"}


def test_other_methods_and_dtypes_do_not_count():
    assert read_by_owner(Overriding()) == set()
    assert read_by_owner(Overriding(), certain=False) == {"called", "guarded"}


def test_both_branches_are_every_forward():
    assert read_by_owner(Both()) == {"always"}


class Rescaling(nn.Module):
    """Divides a weight in place, once."""

    def __init__(self):
        super().__init__()
        self.divided, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
        self.done = False

    def forward(self, x):
        if self.done == self.training:
            self.rescale()
        return self.called(self.divided(x))

    def rescale(self):
        for part in (self,):
            if not self.training:
                part.divided.weight.div_(2)
        self.done = not self.training


def test_what_is_written_into_under_any_condition_counts():
    model = nn.Sequential(Rescaling()).eval()
    assert read_by_owner(model) == {"0.divided"}
    convert(model, DYNAMIC)
    with torch.no_grad():
        before = model[0].divided.weight.clone()
        model(torch.randn(2, 8))
    torch.testing.assert_close(model[0].divided.weight, before / 2)


class Helped(nn.Module):
    """Gives modules to methods that read their weights."""

    def __init__(self):
        super().__init__()
        self.positions, self.named, self.asked, self.called = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.called(x) @ self.rows(self.positions) + self.rows(which=self.named) * self.size(self.asked)

    def rows(self, which):
        return which.weight.t()

    @staticmethod
    def size(module):
        return module.weight.shape[0]


def test_methods_that_are_given_a_module_are_followed():
    assert read_by_owner(Helped()) == {"positions", "named"}


def test_reads_in_branches_that_are_never_taken_do_not_count():
    model = Reader()
    assert "guarded" not in read_by_owner(model)
    model.slow = True
    assert "guarded" in read_by_owner(model)


def test_reads_from_further_out():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8))
            self.inner.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner[0](x @ self.inner.proj.weight)

    assert read_by_owner(Outer()) == {"inner.proj"}


class Hidden(nn.Module):
    """Reads weights in ways that no search in its source finds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            weight = getattr(layer, "wei" + "ght")
            x = x.to(weight.dtype)
            x = layer(x) if number % 2 else torch.addmm(layer.bias, x, weight.T) + weight.sum() * 0
        return x


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_that_no_search_finds_compute_right(scheme, dtype):
    model, x = Hidden().to(dtype), torch.randn(3, 8)
    expected = model(x)
    convert(model, FP8Config(activation_scheme=scheme))
    assert len(quantization_report(model).quantized) == 4 and model(x).dtype == dtype
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.1


@torch.no_grad()
def test_what_calibration_never_called_because_it_was_multiplied_by_stays(caplog):
    """Static activations: whether a branch was taken shows when data goes through."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(F.linear(x, self.proj.weight) if x.ndim == 2 else self.proj(x))

    model, x = Sometimes(), torch.randn(3, 8)
    prepare(model, FP8Config(activation_scheme="static"))
    expected = model(x)
    convert(model)
    report = {module.name: module for module in quantization_report(model).modules}
    assert report["last"].quantized and not report["proj"].quantized
    assert "multiplied by its weight and never called it" in report["proj"].reason
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.1


class LoraLinear(nn.Module):
    """As peft's layers: they name their parts that are adapters, and ask an adapter for its dtype by a local name."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})

    def forward(self, x):
        result = self.base_layer(x)
        for name in self.lora_A:
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]
            result = result + lora_b(lora_a(x.to(lora_a.weight.dtype)))
        return result


@torch.no_grad()
def test_adapters_are_never_quantized():
    model, x = nn.Sequential(LoraLinear(), nn.Linear(8, 8)), torch.randn(3, 8)
    expected = model(x)
    convert(model, DYNAMIC)
    report = {module.name: module for module in quantization_report(model).modules}
    assert {name for name, row in report.items() if row.quantized} == {"0.base_layer", "1"}
    assert {row.reason for name, row in report.items() if "lora" in name} == {"it belongs to an adapter"}
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.1


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
def test_the_converted_model_computes_what_it_should(scheme):
    model, x = Reader(), torch.randn(3, 8)
    expected = model(x)
    convert(model, FP8Config(activation_scheme=scheme))
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.2
    assert not quantization_report(model).fallbacks


@pytest.mark.core
@torch.no_grad()
def test_transformer_layers_of_torch_in_their_fast_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    wrapped, x = nn.Sequential(model, nn.Linear(32, 32)), torch.randn(2, 5, 32)
    expected = wrapped(x)
    convert(wrapped, DYNAMIC)
    assert ((wrapped(x) - expected).norm() / expected.norm()).item() < 0.1
    assert all(row.kernels for row in quantization_report(wrapped).quantized), "their layers are called, not read"
    assert len(quantization_report(wrapped).quantized) == 9


@torch.no_grad()
def test_mamba_multiplies_with_its_weights_and_still_runs():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    convert(model, DYNAMIC)
    assert ((model(ids).logits - expected).norm() / expected.norm()).item() < 0.1
    kept = {row.name.split(".")[-1] for row in quantization_report(model).modules if "multiplies" in row.reason}
    assert kept == {"conv1d", "dt_proj"} and len(quantization_report(model).quantized) == 6


def test_conditions_that_attributes_do_not_tell_are_not_certain():
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64, slow_but_exact=True))
    assert read_by_owner(model) == set(), "only where it also was pretrained in slices"
    assert "transformer.h.0.self_attention.dense" in read_by_owner(model, certain=False)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_reparametrized_weights_are_left_alone(norm):
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    convert(model, DYNAMIC)
    reasons = {module.name: module.reason for module in quantization_report(model).modules}
    assert "parametrized" in reasons["0"] and torch.isfinite(model(torch.ones(1, 4))).all()
