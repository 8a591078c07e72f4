"""One model whose modules differ, by `overrides` and by INC's dict: by hand, by from_pretrained, saved and reloaded."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from hf.conftest import llama
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention import plan_of, scales_of
from optimum_fp8.cache import FP8Tensor
from optimum_fp8.errors import FP8CheckpointError, FP8SelectionError
from optimum_fp8.modules import fp8_modules

IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(2))} for _ in range(3)]

# pattern: what its modules are in a model that is the same everywhere
UNIFORM = {
    r"layers\.0\.mlp\.up_proj": {"fp8_config": "E5M2"},
    r"layers\.0\.mlp\.down_proj": {"scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2"},
    r"layers\.1\.self_attn": {"dynamic_quantization": True},
    r"layers\.1\.mlp\.up_proj": {"scale_method": "maxabs_pcs_pow2"},
    r"layers\.1\.mlp\.gate_proj": {"activation_scheme": "weight_only"},
    r"layers\.1\.mlp\.down_proj": {"use_qdq": True, "hp_dtype": "fp32", "input_backoff": 1.0},
}
MIXED = FP8Config(target="cpu", overrides=UNIFORM)
BY_DICT = FP8Config(
    target="cpu",
    scale_method={
        "default": {"weight": {"rounding_method": "HW_ALIGNED", "backoff": 0.5},
                    "activation": {"rounding_method": "HW_ALIGNED", "backoff": 0.25}},
        "nodes": {"model.layers.0.mlp.up_proj": "maxabs_pow2"},
        "layers": {"1": {"weight": {"granularity": "PCS", "rounding_method": "POW2"}}},
        "layer_types": {"Linear": "maxabs_arbitrary"},
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    llama().to(torch.bfloat16).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def by_hand(original, config):
    model = prepare(copy.deepcopy(original), config)
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    return convert(model)


@pytest.fixture(scope="module")
def mixed(original):
    return by_hand(original, MIXED)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_same(found, expected):
    """Two FP8 models hold and compute the same."""
    state, other = found.state_dict(), expected.state_dict()
    assert set(state) == set(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
    schemes = {name: module.scheme for name, module in fp8_modules(expected).items()}
    assert {name: module.scheme for name, module in fp8_modules(found).items()} == schemes
    assert torch.equal(logits(found), logits(expected))


# --- each module is what it is in a model that is the same everywhere ---------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("pattern", ["", *UNIFORM])
def test_a_module_computes_what_a_uniform_model_of_its_scheme_computes(original, mixed, pattern):
    uniform = by_hand(original, FP8Config(target="cpu", **UNIFORM.get(pattern, {})))
    mine = fp8_modules(mixed)
    names = [
        name for name in mine if (re.search(pattern, name) if pattern else not any(re.search(p, name) for p in UNIFORM))
    ]
    assert names
    for name in names:
        found, expected = mine[name], uniform.get_submodule(name)
        assert found.scheme == expected.scheme and found.codes.dtype is expected.codes.dtype
        assert found.activations == expected.activations
        x = torch.randn(3, 5, found.in_features).bfloat16()
        assert torch.equal(found(x), expected(x)), name
        for key, scale in found.scales().items():
            assert torch.equal(scale, expected.scales()[key]), (name, key)


@pytest.mark.core
def test_incs_dict_gives_each_module_its_method(original):
    model = fp8_modules(by_hand(original, BY_DICT))
    uniform = {
        "model.layers.0.mlp.up_proj": "maxabs_pow2",
        "model.layers.0.mlp.down_proj": "maxabs_arbitrary",
        "model.layers.1.mlp.down_proj": "act_maxabs_hw_weights_pcs_maxabs_pow2",
    }
    for name, method in uniform.items():
        expected = by_hand(original, FP8Config(target="cpu", scale_method=method)).get_submodule(name)
        x = torch.randn(3, expected.in_features).bfloat16()
        assert torch.equal(model[name].weight_scale, expected.weight_scale), name
        assert torch.equal(model[name].input_scale, expected.input_scale), name
        assert torch.equal(model[name](x), expected(x)), name


# --- what users see -----------------------------------------------------------------------------------------------


def test_the_report_shows_each_scheme(mixed):
    report = quantization_report(mixed)
    rows = {row.name: row for row in report.modules if row.quantized}
    assert len(rows) == 14
    schemes = {name: str(module.scheme) for name, module in fp8_modules(mixed).items()}
    assert {name: row.scheme for name, row in rows.items()} == schemes
    assert {row["name"]: row["scheme"] for row in report.to_dict()["modules"]} == schemes | {"lm_head": ""}
    header, _, *lines = str(report).splitlines()[3:]
    assert header.rstrip().endswith("scheme")
    by_name = {line.split()[0]: line for line in lines if line}
    for name, scheme in schemes.items():
        assert by_name[name].rstrip().endswith(scheme)
    up = rows["model.layers.0.mlp.up_proj"]
    by_tensor = "per tensor maxabs hardware"
    assert up.scheme == f"E5M2 on cpu, weight {by_tensor} ×0.5, activations static {by_tensor} ×0.25"
    assert {rows[f"model.layers.1.mlp.{name}_proj"].activations for name in ("up", "gate", "down")} == {
        "dynamic",
        "weight_only",
        "static",
    }


def test_where_all_are_the_same_the_report_has_no_such_column(original):
    text = str(quantization_report(by_hand(original, FP8Config(target="cpu"))))
    assert "scheme" not in text and "E4M3" not in text


# --- from_pretrained, save, reload --------------------------------------------------------------------------------


@pytest.fixture
def folder(original, tmp_path):
    original.save_pretrained(tmp_path / "original")
    return str(tmp_path / "original")


def load(folder, config=None, cls=AutoModelForCausalLM):
    options = {} if config is None else {"quantization_config": config}
    return cls.from_pretrained(folder, **options)


def quantized(folder, config):
    return load(folder, config.replace(dataset=BATCHES))


@pytest.fixture
def checkpoint(mixed, tmp_path):
    mixed.save_pretrained(tmp_path / "fp8")
    return str(tmp_path / "fp8")


@pytest.mark.core
@pytest.mark.parametrize("config", [MIXED, BY_DICT], ids=["overrides", "dict"])
def test_loaded_with_a_dataset_it_is_what_it_is_by_hand_and_stays_so_on_disk(original, folder, tmp_path, config):
    model, by_hand_ = quantized(folder, config), fp8_modules(by_hand(original, config))
    for name, module in fp8_modules(model).items():
        assert module.scheme == by_hand_[name].scheme and torch.equal(module.weight_scale, by_hand_[name].weight_scale)
        if module.input_scale is not None:  # here weights were in FP8 while it was calibrated
            torch.testing.assert_close(module.input_scale, by_hand_[name].input_scale, rtol=0.1, atol=0)
    model.save_pretrained(tmp_path / "fp8")
    again = load(tmp_path / "fp8")
    assert_same(again, model)
    again.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)
    files = [tmp_path / name / "config.json" for name in ("fp8", "again")]
    first, second = (json.loads(file.read_text())["quantization_config"] for file in files)
    assert first == second, "what is saved does not drift"


def test_the_checkpoint_says_every_exception_by_name(checkpoint):
    written = json.loads((Path(checkpoint) / "config.json").read_text())["quantization_config"]
    saved = FP8Config.from_dict(written)
    names = {name for pattern in saved.overrides for name in fp8_names() if re.search(pattern, name)}
    assert names == {name for name in fp8_names() if any(re.search(p, name) for p in UNIFORM)}
    assert saved.activation_scheme == "static" and saved.fp8_config == "E4M3"
    assert saved.for_module(["model.layers.0.mlp.up_proj"]).fp8_config == "E5M2"
    assert saved.for_module(["model.layers.1.self_attn.q_proj"]).scheme == "dynamic"


def fp8_names():
    return [name for name, module in llama().named_modules() if isinstance(module, nn.Linear)]


def test_dequantized_it_is_a_plain_model_again(mixed, original):
    model = copy.deepcopy(mixed).dequantize()
    assert not fp8_modules(model)
    for name, module in fp8_modules(mixed).items():
        assert torch.equal(model.get_submodule(name).weight, module.dequantized_weight(torch.bfloat16))


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_the_modules_of_a_base_model_keep_their_schemes_under_another_head(mixed, checkpoint, cls):
    body = load(checkpoint, cls=cls)
    base = body if cls is AutoModel else body.model
    for name, module in fp8_modules(mixed.model).items():
        assert base.get_submodule(name).scheme == module.scheme, name
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, mixed.model(IDS).last_hidden_state)


def test_a_base_model_saved_alone_keeps_them_too(mixed, checkpoint, tmp_path):
    load(checkpoint, cls=AutoModel).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", cls=AutoModel)
    for name, module in fp8_modules(mixed.model).items():
        assert base.get_submodule(name).scheme == module.scheme, name


# --- asked for again when loading ---------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("asked", [{"overrides": UNIFORM}, {"overrides": UNIFORM, "target": "cpu"}, {}], ids=str)
def test_the_same_overrides_may_be_said_when_loading(mixed, checkpoint, asked):
    assert torch.equal(logits(load(checkpoint, FP8Config(**asked))), logits(mixed))


@pytest.mark.parametrize(
    "overrides, name",
    [
        ({**UNIFORM, r"0\.mlp\.up_proj": {"fp8_config": "E4M3"}}, r"layers\.0\.mlp\.up_proj"),
        ({**UNIFORM, "gate_proj": {"scale_method": "maxabs_pow2"}}, r"layers\.0\.mlp\.gate_proj"),
        ({r"layers\.0\.mlp\.up_proj": {"fp8_config": "E5M2"}}, r"layers\.\d\.\w+\.\w+_proj"),
    ],
    ids=["another format", "another method", "fewer"],
)
def test_other_overrides_are_refused_when_loading(checkpoint, overrides, name):
    with pytest.raises(FP8CheckpointError, match=rf"^model\.{name}: overrides ask for .*, but the checkpoint has "):
        load(checkpoint, FP8Config(overrides=overrides))


def test_the_same_dict_may_be_said_when_loading_and_another_is_refused(original, tmp_path):
    model = by_hand(original, BY_DICT)
    model.save_pretrained(tmp_path / "fp8")
    method = copy.deepcopy(BY_DICT.scale_method)
    assert torch.equal(logits(load(tmp_path / "fp8", FP8Config(scale_method=method))), logits(model))
    method["layers"] = {"0": method["layers"]["1"]}
    with pytest.raises(FP8CheckpointError, match="scale_method asks? for"):
        load(tmp_path / "fp8", FP8Config(scale_method=method))


def by_section(section, key):
    return {"scale_method": {"default": "maxabs_hw", section: {key: "maxabs_pow2"}}}


@pytest.mark.core
@pytest.mark.parametrize(
    "options, pattern",
    [
        ({"overrides": {"up_porj": {"fp8_config": "E5M2"}}}, r"overrides 'up_porj'"),
        (by_section("nodes", "model.layer.0"), r"\['nodes'\] 'model\.layer\.0'"),
        (by_section("layers", "7"), r"\['layers'\] '7'"),
        (by_section("layer_types", "Linaer"), r"\['layer_types'\] 'Linaer'"),
    ],
    ids=["overrides", "nodes", "layers", "layer_types"],
)
def test_what_matches_no_module_is_an_error(original, folder, options, pattern):
    config = FP8Config(activation_scheme="dynamic", **options)
    message = rf"{pattern} holds for no module that can be quantized of this model"
    for step in (lambda: prepare(original, config), lambda: convert(original, config), lambda: load(folder, config)):
        with pytest.raises(FP8SelectionError, match=message):
            step()
    assert not fp8_modules(original)


# --- attention ----------------------------------------------------------------------------------------------------

ATTENTION = {
    "attention in layer 1": {"overrides": {r"layers\.1\.self_attn$": {"attention": True}}},
    "all but layer 0": {"attention": True, "overrides": {r"layers\.0\.self_attn$": {"attention": False}}},
    "cache in layer 0": {"overrides": {r"layers\.0\.self_attn$": {"kv_cache": True}}},
    "each its own": {
        "attention": True,
        "kv_cache": True,
        "overrides": {
            r"layers\.0\.self_attn$": {"attention_granularity": "head", "fp8_config": "E5M2"},
            r"layers\.1\.self_attn$": {"activation_scheme": "dynamic"},
        },
    },
}
SCALES = {
    "attention in layer 1": [set(), {"q_scale", "k_scale", "v_scale", "p_scale", "output_scale"}],
    "all but layer 0": [set(), {"q_scale", "k_scale", "v_scale", "p_scale", "output_scale"}],
    "cache in layer 0": [{"k_scale", "v_scale"}, set()],
    "each its own": [{"q_scale", "k_scale", "v_scale", "p_scale", "output_scale"}, {"p_scale"}],
}


@pytest.mark.core
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_differs_by_layer_and_stays_so_on_disk(folder, tmp_path, case):
    model = quantized(folder, FP8Config(target="cpu", decode_steps=1, **ATTENTION[case]))
    attention = [layer.self_attn for layer in model.model.layers]
    assert [set(scales_of(module)) for module in attention] == SCALES[case]
    assert [plan_of(module) is not None for module in attention] == [bool(each) for each in SCALES[case]]
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    stored = [isinstance(layer.keys, FP8Tensor) for layer in cache.layers]
    assert stored == [
        scheme is not None and scheme.scheme.caches for scheme in (plan_of(module) for module in attention)
    ]
    if case == "each its own":
        assert [layer.keys.codes.dtype for layer in cache.layers] == [torch.float8_e5m2, torch.float8_e4m3fn]
        assert scales_of(attention[0])["q_scale"].shape == (4, 1, 1)
    rows = {row.name: row for row in quantization_report(model).attention}
    assert [
        rows[f"model.layers.{i}.self_attn"].quantized if f"model.layers.{i}.self_attn" in rows else False
        for i in (0, 1)
    ] == [bool(each) for each in SCALES[case]]
    if case == "each its own":
        assert rows["model.layers.0.self_attn"].scheme.startswith("E5M2 on cpu, operands static per head")
        assert rows["model.layers.1.self_attn"].scheme.startswith("E4M3 on cpu, operands dynamic")
        assert all(rows[name].scheme in str(quantization_report(model)) for name in rows)
    model.save_pretrained(tmp_path / "fp8")
    assert_same(load(tmp_path / "fp8"), model)


def test_attention_in_one_layer_computes_what_it_computes_in_all(original):
    one = by_hand(original, FP8Config(target="cpu", overrides={r"layers\.0\.self_attn$": {"attention": True}}))
    both = by_hand(original, FP8Config(target="cpu", attention=True))
    mine, theirs = (scales_of(model.model.layers[0].self_attn) for model in (one, both))
    assert {name: scale.tolist() for name, scale in mine.items()} == {
        name: scale.tolist() for name, scale in theirs.items()
    }
    with torch.no_grad():
        found, expected = (model.model(IDS, output_hidden_states=True).hidden_states for model in (one, both))
    assert torch.equal(found[1], expected[1]) and not torch.equal(found[2], expected[2])
