"""Which modules are quantized, and the reason why each of the others is not."""

import re

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8SelectionError
from optimum_fp8.selection import matches_name, select


class SameForward(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


class OwnForward(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv = nn.Conv2d(1, 2, 3)
        self.gpt = Conv1D(8, 8)
        self.norm = nn.LayerNorm(8)


def model():
    return nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "head": nn.Linear(8, 2)})


ALL = {f"layers.{i}.{name}" for i in (0, 1) for name in ("fc1", "fc2", "conv", "gpt")} | {"head"}


def selected(model, **options):
    return {decision.name for decision in select(model, FP8Config(**options)) if decision.selected}


def reasons(model, **options):
    return {decision.name: decision.reason for decision in select(model, FP8Config(**options))}


@pytest.mark.core
def test_linear_conv1d_and_conv2d_are_selected_and_nothing_else():
    decisions = select(model(), FP8Config())
    assert {decision.name for decision in decisions} == ALL
    assert all(decision.selected and decision.reason == "selected" for decision in decisions)
    assert {decision.type for decision in decisions} == {"Linear", "Conv1D", "Conv2d"}


@pytest.mark.core
def test_subclasses_need_the_same_forward():
    found = reasons(nn.ModuleDict({"same": SameForward(4, 4), "own": OwnForward(4, 4)}))
    assert found["same"] == "selected"
    assert found["own"] == "OwnForward has a forward of its own"


def test_a_forward_set_on_the_instance_is_a_forward_of_its_own():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["a"].forward = lambda x: x
    assert "forward" in reasons(net)["a"]


def test_out_proj_of_multihead_attention_is_called_where_that_is_in_fp8():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert set(reasons(model).values()) == {"selected"}
    found = reasons(model, blocklist={"types": ["MultiheadAttention"]})
    assert "never calls it" in found["attention.out_proj"]
    assert found["fc"] == "selected"


@pytest.mark.parametrize(
    "module, reason",
    [
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "forward of its own|parametrized"),
        (lambda: nn.Linear(4, 4).to(torch.complex64), "not a floating-point"),
        (lambda: nn.Linear(0, 4), "not a floating-point"),
    ],
    ids=["spectral_norm", "complex", "empty"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Complex modules")
def test_weights_that_cannot_be_fp8_are_left_out(module, reason):
    found = select(nn.Sequential(module(), nn.Linear(4, 4)), FP8Config())
    assert [decision.selected for decision in found] == [False, True]
    assert re.search(reason, found[0].reason)


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("fc", {"layers.0.fc1", "layers.0.fc2", "layers.1.fc1", "layers.1.fc2"}),
        (r"fc1$", {"layers.0.fc1", "layers.1.fc1"}),
        (r"layers\.1\.", {"layers.1.fc1", "layers.1.fc2", "layers.1.conv", "layers.1.gpt"}),
        (r"^head", {"head"}),
        (r"0.*(conv|gpt)", {"layers.0.conv", "layers.0.gpt"}),
    ],
)
def test_names_are_regexes_searched_in_the_qualified_name(pattern, names):
    assert selected(model(), allowlist={"names": [pattern]}) == names
    assert selected(model(), blocklist={"names": [pattern]}) == ALL - names


@pytest.mark.core
@pytest.mark.parametrize("kind", ["Linear", "torch.nn.Linear", "torch.nn.modules.linear.Linear", nn.Linear])
def test_types_by_any_of_their_names(kind):
    linears = {name for name in ALL if "fc" in name} | {"head"}
    assert selected(model(), allowlist={"types": [kind]}) == linears
    assert selected(model(), blocklist={"types": [kind]}) == ALL - linears


def test_types_are_exact_classes():
    net = nn.Sequential(SameForward(4, 4), nn.Linear(4, 4))
    assert selected(net, allowlist={"types": [nn.Linear]}) == {"1"}
    assert selected(net, allowlist={"types": [SameForward]}) == {"0"}
    assert selected(net, blocklist={"types": ["SameForward"]}) == {"1"}


def test_names_and_types_of_the_allowlist_add_up():
    names = selected(model(), allowlist={"names": ["head"], "types": ["Conv2d"]})
    assert names == {"layers.0.conv", "layers.1.conv", "head"}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"blocklist": {"names": ["fc1"]}}, "blocklist name 'fc1'"),
        ({"blocklist": {"types": ["Linear"]}}, "blocklist type 'Linear'"),
        ({"modules_to_not_convert": ["fc1"]}, "modules_to_not_convert 'fc1'"),
        ({"allowlist": {"names": ["fc2"]}}, "not in allowlist"),
    ],
)
def test_the_reason_names_the_entry(options, reason):
    assert reasons(model(), **options)["layers.0.fc1"] == reason


@pytest.mark.parametrize(
    "entry, name, matches",
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "lm_head_2", False),
        ("layers.1", "layers.1.fc1", True),
        ("layers.1", "layers.10.fc1", False),
        ("fc1", "layers.0.fc1", True),
        ("mlp", "model.layers.0.mlp.up_proj", True),
        ("mlp", "model.layers.0.mlp2.up_proj", False),
        (r"layers\.\d+\.fc1", "layers.12.fc1", True),
    ],
)
def test_modules_to_not_convert_means_a_module_and_what_is_inside(entry, name, matches):
    assert matches_name(entry, name) is matches


@pytest.mark.core
@pytest.mark.parametrize(
    "options, hint",
    [
        ({"allowlist": {"names": ["layers.0.fc3"]}}, "allowlist name 'layers.0.fc3' matches no module"),
        ({"blocklist": {"names": ["haed"]}}, "did you mean 'head'"),
        ({"blocklist": {"types": ["LayerNrm"]}}, "did you mean 'LayerNorm'"),
        ({"allowlist": {"types": ["torch.nn.Bilinear"]}}, "matches no module"),
        ({"modules_to_not_convert": ["heads"]}, "did you mean 'head'"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing_is_an_error(options, hint):
    with pytest.raises(FP8SelectionError) as error:
        select(model(), FP8Config(**options))
    assert hint in str(error.value) and "valid: " in str(error.value)


def test_a_known_type_that_the_model_lacks_is_no_mistake():
    net = nn.Sequential(nn.Linear(4, 4))
    assert selected(net, blocklist={"types": ["Conv2d", "Matmul", "torch.nn.Conv2d"]}) == {"0"}


def test_the_choices_are_shown_for_one_layer_of_many():
    net = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(30))})
    with pytest.raises(FP8SelectionError) as error:
        select(net, FP8Config(blocklist={"names": ["qkv"]}))
    assert "fc1" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "net, options, message",
    [
        (nn.Sequential(nn.LayerNorm(4)), {}, "no Conv1d, Conv2d, .*ConvTranspose3d, Linear or transformers' Conv1D"),
        (nn.Sequential(nn.Linear(4, 4)), {"blocklist": {"names": ["0"]}}, "0: blocklist name '0'"),
        (nn.Sequential(OwnForward(4, 4)), {}, "forward of its own"),
    ],
)
def test_nothing_selected_is_an_error_with_reasons(net, options, message):
    with pytest.raises(FP8SelectionError, match=message):
        select(net, FP8Config(**options))


# --- models of transformers ---------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "make, kept, an_fp8_module",
    [
        (tiny_llama, "lm_head", "model.layers.0.mlp.up_proj"),
        (tiny_gpt2, "lm_head", "transformer.h.0.attn.c_attn"),
        (tiny_bert, "classifier", "bert.encoder.layer.0.attention.self.query"),
    ],
)
def test_the_head_of_a_model_is_kept_by_default(make, kept, an_fp8_module):
    net = make()
    found = reasons(net)
    assert found[kept] == "kept by default: head, tied or float32"
    assert found[an_fp8_module] == "selected"
    assert reasons(net, quantize_lm_head=True)[kept] == "selected"


def test_gpt2_is_made_of_conv1d():
    decisions = select(tiny_gpt2(), FP8Config(allowlist={"types": ["Conv1D"]}))
    assert {decision.type for decision in decisions if decision.selected} == {"Conv1D"}
    assert sum(decision.selected for decision in decisions) == 4


def test_tied_heads_are_kept_by_default():
    assert "kept by default" in reasons(tiny_llama(tie_word_embeddings=True))["lm_head"]


def test_modules_kept_in_float32_stay_even_with_quantize_lm_head():
    net = tiny_llama()
    net._keep_in_fp32_modules = ["down_proj"]
    for head in (False, True):
        assert "kept by default" in reasons(net, quantize_lm_head=head)["model.layers.0.mlp.down_proj"]


# --- modules in several places ------------------------------------------------------------------------------------


def test_a_shared_module_is_decided_once_under_its_first_name():
    shared = nn.Linear(4, 4)
    decisions = select(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)}), FP8Config())
    assert [decision.name for decision in decisions] == ["a", "c"]


@pytest.mark.parametrize("options", [{"blocklist": {"names": ["^b$"]}}, {"modules_to_not_convert": ["b"]}], ids=str)
def test_a_shared_module_is_excluded_by_any_of_its_names(options):
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    assert selected(net, **options) == {"c"}
