"""What wins where two keys speak about the same thing: one test a row."""

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.attention import scales_of
from optimum_fp8.errors import FP8ConfigError
from optimum_fp8.scales import SCALE_METHODS
from optimum_fp8.selection import select


def selected(model, **options):
    return {decision.name for decision in select(model, FP8Config(**options)) if decision.selected}


@pytest.mark.parametrize(
    "options, scheme",
    [
        ({"dynamic_quantization": True}, "dynamic"),
        ({"dynamic_quantization": True, "activation_scheme": "auto"}, "dynamic"),
        ({"dynamic_quantization": True, "activation_scheme": "dynamic"}, "dynamic"),
        ({"dynamic_quantization": False, "activation_scheme": "dynamic"}, "dynamic"),
        ({"dynamic_quantization": False, "activation_scheme": "static"}, "static"),
        ({"dynamic_quantization": False}, "auto"),
    ],
    ids=str,
)
def test_dynamic_quantization_vs_activation_scheme(options, scheme):
    assert FP8Config(**options).scheme == scheme


def test_dynamic_quantization_never_overrules_an_explicit_scheme():
    for scheme in ("static", "weight_only"):
        with pytest.raises(FP8ConfigError, match="contradicts"):
            FP8Config(dynamic_quantization=True, activation_scheme=scheme)


@pytest.mark.parametrize("method", ["act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw", "maxabs_pcs_pow2"])
def test_dynamic_only_scale_method_vs_activation_scheme(method):
    assert FP8Config(scale_method=method).scheme == "dynamic"
    assert FP8Config(scale_method=method, activation_scheme="dynamic").scheme == "dynamic"
    assert FP8Config(scale_method=method, activation_scheme="weight_only").scheme == "weight_only"
    with pytest.raises(FP8ConfigError, match="only exists dynamically"):
        FP8Config(scale_method=method, activation_scheme="static")


@pytest.mark.parametrize("method", ["unit_scale", "hw_aligned_single_scale"])
def test_fixed_scale_method_vs_activation_scheme(method):
    assert FP8Config(scale_method=method).scheme == "static"
    assert FP8Config(scale_method=method, activation_scheme="weight_only").scheme == "weight_only"
    for options in ({"activation_scheme": "dynamic"}, {"dynamic_quantization": True}):
        with pytest.raises(FP8ConfigError, match="fixed scale"):
            FP8Config(scale_method=method, **options)


@pytest.mark.parametrize("method", ["unit_scale", "hw_aligned_single_scale"])
def test_fixed_scale_method_needs_no_data(method):
    model = convert(nn.Sequential(nn.Linear(4, 4)), FP8Config(scale_method=method, target="gaudi2"))
    expected = 1.0 if method == "unit_scale" else 16.0
    assert model[0].activations == "static"
    assert model[0].input_scale.item() == expected and model[0].weight_scale.unique().item() == expected


def test_every_other_scale_method_is_calibrated_if_there_is_data():
    for name, method in SCALE_METHODS.items():
        if method.activation.needs_range and not method.dynamic_only:
            assert FP8Config(scale_method=name).scheme == "auto"


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hp_dtype_vs_dtype_of_the_model(dtype):
    x = torch.full((2, 4), 0.7001953125, dtype=dtype)  # exact in all three dtypes, maxabs / 112 in none of them
    scales = {}
    for hp_dtype in ("bf16", "fp32"):
        config = FP8Config(hp_dtype=hp_dtype, scale_method="maxabs_arbitrary", target="cpu")
        model = prepare(nn.Sequential(nn.Linear(4, 4)).to(dtype), config)
        model(x)
        convert(model)
        assert model(x).dtype == dtype, "hp_dtype decides the arithmetic of scales only"
        assert model[0].bias.dtype == dtype
        assert model[0].input_scale.dtype == torch.float32
        scales[hp_dtype] = model[0].input_scale
    bf16, maxabs = torch.bfloat16, x.abs().max().float().reshape(1)
    assert torch.equal(scales["bf16"], (maxabs.to(bf16) / 112).float())
    assert torch.equal(scales["fp32"], maxabs / 112)
    assert not torch.equal(scales["bf16"], scales["fp32"])


LLAMA_BLOCK = {
    f"model.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
} | {f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.core
@pytest.mark.parametrize(
    "options",
    [
        {"allowlist": {"names": ["proj"]}, "blocklist": {"names": ["mlp"]}},
        {"allowlist": {"types": ["Linear"]}, "blocklist": {"names": ["mlp"]}},
        {"allowlist": {"names": ["mlp", "self_attn"]}, "modules_to_not_convert": ["mlp"]},
    ],
    ids=str,
)
def test_allowlist_vs_exclusions(options):
    assert selected(tiny_llama(), **options) == {name for name in LLAMA_BLOCK if "self_attn" in name}


def test_allowlist_vs_blocklist_of_the_same_type():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1))
    lists = {"allowlist": {"names": [".*"]}, "blocklist": {"types": [nn.Linear]}}
    assert selected(model, **lists) == {"1"}


@pytest.mark.parametrize("allowlist", [{"names": ["lm_head", "mlp"]}, {"types": [nn.Linear]}, {"names": [".*"]}])
def test_allowlist_vs_defaults(allowlist):
    names = selected(tiny_llama(), allowlist=allowlist)
    assert names and "lm_head" not in names


def test_quantize_lm_head_vs_defaults():
    assert selected(tiny_llama()) == LLAMA_BLOCK
    assert selected(tiny_llama(), quantize_lm_head=True) == LLAMA_BLOCK | {"lm_head"}


@pytest.mark.core
@pytest.mark.parametrize(
    "options",
    [
        {"blocklist": {"names": ["lm_head"]}},
        {"modules_to_not_convert": ["lm_head"]},
        {"allowlist": {"names": ["model.layers"]}},
    ],
    ids=str,
)
def test_quantize_lm_head_vs_lists(options):
    assert selected(tiny_llama(), quantize_lm_head=True, **options) == LLAMA_BLOCK, "it removes the default, no list"


def test_modules_to_not_convert_vs_defaults():
    names = selected(tiny_llama(), modules_to_not_convert=["q_proj"])
    assert names == {name for name in LLAMA_BLOCK if "q_proj" not in name}, "it adds to the defaults"


def test_input_backoff_vs_scale_params():
    assert FP8Config(scale_params={"input_backoff": 0.5}) == FP8Config(input_backoff=0.5)
    assert FP8Config(scale_params={"input_backoff": 0.5}, weight_backoff=0.3).weight_backoff == 0.3
    with pytest.raises(FP8ConfigError, match="contradicts"):
        FP8Config(scale_params={"input_backoff": 0.5}, input_backoff=0.25)


def test_backoffs_vs_scale_method():
    x = torch.full((1, 4), 7.0)
    scales = {}
    for backoff in (None, 1.0):
        config = FP8Config(
            scale_method="maxabs_arbitrary",
            hp_dtype="fp32",
            target="cpu",
            input_backoff=backoff,
            weight_backoff=backoff,
        )
        model = prepare(nn.Sequential(nn.Linear(4, 4, bias=False)), config)
        nn.init.constant_(model[0].weight, 7.0)
        model(x)
        convert(model)
        scales[backoff] = (model[0].input_scale.item(), model[0].weight_scale.item())
    assert scales[None] == (7.0 / (448 * 0.25), 7.0 / (448 * 0.5))
    assert scales[1.0] == (7.0 / 448, 7.0 / 448)


@pytest.mark.parametrize(
    "options, divisor",
    [({}, 112), ({"input_backoff": 0.5}, 224), ({"input_backoff": 0.5, "softmax_backoff": 1.0}, 448)],
    ids=str,
)
def test_softmax_backoff_vs_input_backoff(options, divisor):
    model = tiny_llama()
    prepare(model, FP8Config(attention=True, scale_method="maxabs_arbitrary", hp_dtype="fp32", target="cpu", **options))
    model(torch.arange(5)[None])
    assert scales_of(convert(model).model.layers[0].self_attn)["p_scale"].item() == pytest.approx(1 / divisor)
