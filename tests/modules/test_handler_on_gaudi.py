"""Every kind of attention module, cache and mixture of experts, by every rule of scales.

Each operator that they call gives on an emulated Gaudi what the ordinary path of a CPU gives for the same operands.
(Layers are in test_layer_on_gaudi.py.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import vllm_gaudi_model
from attention_models import FAMILIES
from gaudi_expert_models import IDS as EXPERT_IDS
from gaudi_expert_models import GaudiMixtral, VllmMixtral, expert_model
from gaudi_models import CONFIG, gaudi_model, generate
from grids import over
from on_gaudi import NothingIsRead, as_on_a_card, compared
from scale_methods import FOR_ANY_SHAPE
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from vllm_gaudi_model import Runner

from optimum_fp8 import FP8Config, convert, finalize_calibration, ops, prepare, quantization_report
from optimum_fp8.attention.handlers import UnsupportedHandler
from optimum_fp8.formats import FP8_DTYPES
from optimum_fp8.modules import LayerHandler
from optimum_fp8.modules.handler import converted_modules, handlers
from optimum_fp8.test_utils import gaudi

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
HIDDEN = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
TARGETS = ["gaudi2", "gaudi3"]


class Subject:
    """A model in bfloat16, how it is called, and what of it is quantized.

    Args:
        operator: what it is there for.
        make: makes the model.
        call: given the model and the dtype of its caches.
        config: keys of FP8Config.
    """

    def __init__(self, operator, make, call, **config):
        self.operator, self.make, self.call, self.config = operator, make, call, config


def of_family(operator, name):
    family = FAMILIES[name]
    return Subject(
        operator,
        lambda: family.make().bfloat16(),
        lambda model, dtype: model(**family.inputs),
        attention=True,
        kv_cache=True,
        blocklist={"types": ["Linear"]},
    )


def with_helpers(operator, flash, others):
    return Subject(
        operator,
        lambda: gaudi_model().bfloat16(),
        lambda model, dtype: generate(model, IDS, 1, flash=flash),
        attention=True,
        kv_cache=True,
        blocklist={"types": ["Linear"], "names": others},
    )


def with_blocks():
    def make():
        torch.manual_seed(3)
        return vllm_gaudi_model.LlamaForCausalLM(CONFIG, "naive_impl").bfloat16().eval()

    types = ["Matmul", "B2BMatmul", "Softmax", "VLLMKVCache"]
    call = lambda model, dtype: Runner(model, 8, dtype=dtype).generate(list(IDS), 1)  # noqa: E731
    return Subject("matmul", make, call, allowlist={"types": types})


def with_experts(model_class):
    make = partial(expert_model, model_class, num_hidden_layers=1)
    return Subject("experts", make, lambda model, dtype: model(EXPERT_IDS[:, :6]), blocklist={"types": ["Linear"]})


def with_fused_experts():
    def make():
        torch.manual_seed(5)
        sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"num_hidden_layers": 1, "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralForCausalLM(MixtralConfig(**sizes)).bfloat16().eval()

    return Subject("experts", make, lambda model, dtype: model(IDS), blocklist={"types": ["Linear"]})


def with_torch_attention():
    def make():
        torch.manual_seed(5)
        return TwoInputs(nn.MultiheadAttention(32, 4, batch_first=True)).bfloat16().eval()

    call = lambda model, dtype: model(HIDDEN)  # noqa: E731
    return Subject("linear", make, call, blocklist={"names": ["out_proj"]})


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.rnn = nn.GRU(32, 16, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class TwoInputs(nn.Module):
    """Attention to itself, and to something else."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        x = self.attention(x, x, x)[0]
        return self.attention(x, HIDDEN, HIDDEN, need_weights=False)[0]


ATTENTION = {
    "interface": of_family("attention", "llama"),
    "functions": of_family("matmul", "bloom"),
    "products": with_helpers("matmul", False, ["fused_scaled"]),
    "fused": with_helpers("attention", True, ["matmul", "softmax"]),
    "blocks": with_blocks(),
    "torch": with_torch_attention(),
}
RECURRENT = Subject("cast_from_fp8", lambda: Recurrent().bfloat16().eval(), lambda model, dtype: model(HIDDEN))
EXPERTS = {
    "optimum-habana": with_experts(GaudiMixtral),
    "vLLM": with_experts(VllmMixtral),
    "transformers": with_fused_experts(),
}


def ways(*parts: str, searched: bool = False) -> list[tuple[str, str]]:
    """Methods that have every rule of some parts, "activation" or "weight", with every way to scale activations.

    Args:
        searched: those that search for the scales of weights, which takes longer, or the others.
    """
    found: dict[Any, tuple[str, str]] = {}
    for name, method in FOR_ANY_SHAPE.items():
        rules = [getattr(method, part) for part in parts]
        if ("weight" in parts and method.weight.value == "search") is not searched:
            continue
        if not method.dynamic_only:
            found.setdefault(("static", *rules), (name, "static"))
        if method.activation.needs_range:
            found.setdefault(("dynamic", method.dynamic, *rules), (name, "dynamic"))
    return list(found.values())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Where the measurements of each model lie."""
    paths = {}
    for name, subject in (ATTENTION | EXPERTS).items():
        paths[name] = tmp_path_factory.mktemp("ranges") / "measured"
        with gaudi.emulated("gaudi2"):
            model = prepare(subject.make(), FP8Config(dump_stats_path=paths[name], **subject.config))
            subject.call(model, torch.bfloat16)
            finalize_calibration(model)
    return paths


def quantized(subject, path, target, fp8_config, way):
    keys = {"scale_method": way[0], "activation_scheme": way[1], "fp8_config": fp8_config, "target": target}
    return convert(subject.make(), FP8Config(mode="QUANTIZE", dump_stats_path=path, **subject.config, **keys))


def recurrent(target, method):
    return convert(RECURRENT.make(), FP8Config(target=target, scale_method=method, activation_scheme="weight_only"))


def assert_predicted(subject, path, target, fp8_config, way):
    with compared(target) as comparison:
        model = quantized(subject, path, target, fp8_config, way)
        subject.call(model, FP8_DTYPES[fp8_config])
    assert not comparison.refused and comparison.ran[subject.operator]
    assert {"cast_to_fp8", "cast_to_fp8_by_range", "dynamic_scale"} & set(comparison.ran)
    assert comparison.few_flips()


def test_every_kind_is_there(measured):
    found = set()
    for name, subject in (ATTENTION | EXPERTS).items():
        model = quantized(subject, measured[name], "gaudi2", "E4M3", ("maxabs_hw", "static"))
        found |= {handler.kind for _, handler in converted_modules(model).values()}
    found |= {handler.kind for _, handler in converted_modules(recurrent("gaudi2", "maxabs_hw")).values()}
    others = (LayerHandler, UnsupportedHandler)
    assert found == {handler.kind for handler in handlers() if not isinstance(handler, others)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ATTENTION)
@over(way=ways("activation"))
def test_attention(measured, name, target, way):
    assert_predicted(ATTENTION[name], measured[name], target, "E4M3", way)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ATTENTION)
@over(way=[("maxabs_hw", "static"), ("maxabs_arbitrary", "static"), ("maxabs_hw", "dynamic")])
def test_attention_in_e5m2(measured, name, target, way):
    assert_predicted(ATTENTION[name], measured[name], target, "E5M2", way)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name, fp8_config", [("optimum-habana", "E4M3"), ("vLLM", "E5M2"), ("transformers", "E4M3")])
@over(way=ways("activation", "weight"))
def test_experts(measured, name, target, fp8_config, way):
    assert_predicted(EXPERTS[name], measured[name], target, fp8_config, way)


@over(way=ways("activation", "weight", searched=True)[::2])
def test_experts_whose_scales_are_searched_for(measured, way):
    assert_predicted(EXPERTS["vLLM"], measured["vLLM"], "gaudi2", "E4M3", way)


@pytest.mark.parametrize("name", [*ATTENTION, *EXPERTS])
@over(way=[("maxabs_hw", "static"), ("maxabs_hw", "dynamic")])
def test_no_value_is_read(measured, name, way):
    """In the forward passes of a model on a card, of which the first prepares the next ones' short way."""
    subject = (ATTENTION | EXPERTS)[name]
    with gaudi.emulated("gaudi2"):
        with ops.backend("hpu"):
            model = quantized(subject, measured[name], "gaudi2", "E4M3", way)
        with as_on_a_card(), NothingIsRead():
            subject.call(model, torch.float8_e4m3fn)
    assert set(quantization_report(model).kernels) == {"hpu"}


@pytest.mark.parametrize("target", TARGETS)
@over(way=[method for method, scheme in ways("weight") if scheme == "static"])
def test_recurrent_layers(target, way):
    """Their weights are dequantized by the card's operator; torch computes with the values."""
    expected = RECURRENT.call(recurrent(target, way), torch.bfloat16)
    with gaudi.emulated(target), ops.backend("hpu"):
        model = recurrent(target, way)
        found = RECURRENT.call(model, torch.bfloat16)
    assert torch.equal(found, expected) and set(quantization_report(model).kernels) == {"hpu"}
