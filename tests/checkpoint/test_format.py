"""Formats of checkpoints: neutral records of a converted model, formats from outside, and writing all or nothing."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.checkpoint import (
    FORMATS,
    Checkpoint,
    Native,
    Record,
    checkpoint_of,
    format_called,
    register_format,
    write,
)
from optimum_fp8.errors import FP8CheckpointError, FP8ConfigError, FP8NotAvailableError, FP8StateError

IDS = torch.arange(3, 12)[None]


def net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    prepare(model, FP8Config(**{"target": "cpu", "activation_scheme": "static", **options}))
    model(torch.ones(1, 4))
    return convert(model)


@pytest.fixture
def language_model():
    model = prepare(tiny_llama(), FP8Config(target="cpu", attention=True, activation_scheme="static"))
    model(IDS)
    return convert(model)


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    """What a test registers is gone after it."""
    before = dict(FORMATS)
    yield
    FORMATS.clear()
    FORMATS.update(before)


class Scales:
    """A format from outside: scales alone, as JSON."""

    def refuse(self, checkpoint):
        for record in checkpoint.records:
            if record.scheme.is_dynamic:
                raise FP8CheckpointError(f"{record.name}: dynamic activations have no scale to write")

    def tensors(self, checkpoint):
        return {}

    def config(self, checkpoint):
        return {
            record.name: {name: tensor.tolist() for name, tensor in record.tensors.items() if name.endswith("_scale")}
            for record in checkpoint.records
        }

    def records(self, files):
        with open(files[0], encoding="utf-8") as file:
            said = json.load(file)
        records = [
            Record(name, "", None, {key: torch.tensor(value) for key, value in scales.items()})
            for name, scales in said.items()
        ]
        return Checkpoint(records, [], [], None)


# --- records ------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_records_hold_what_is_in_memory(language_model):
    checkpoint = checkpoint_of(language_model)
    records = {record.name: record for record in checkpoint.records}
    up = language_model.model.layers[0].mlp.up_proj
    record = records["model.layers.0.mlp.up_proj"]
    assert (record.kind, record.scheme) == ("linear", up.scheme)
    assert set(record.tensors) == {"weight", "weight_scale", "input_scale"} and record.tensors["weight"] is up.codes
    attention = records["model.layers.0.self_attn"]
    assert attention.kind == "attention interface"
    assert {f"fp8_scales.{name}_scale" for name in ("q", "k", "v", "p", "output")} == set(attention.tensors)
    assert checkpoint.left_out == ["lm_head"] and checkpoint.config.attention is True
    names = [names[0] for names, types in checkpoint.selected]
    assert set(names) == set(records) and all(types for _, types in checkpoint.selected)


def test_models_that_are_not_converted_have_none():
    with pytest.raises(FP8StateError, match="not converted to FP8: call convert"):
        checkpoint_of(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(FP8StateError, match="in measuring state"):
        checkpoint_of(prepare(nn.Sequential(nn.Linear(4, 4)), FP8Config()))


def test_a_part_has_records_without_a_configuration():
    checkpoint = checkpoint_of(nn.ModuleList([net()]))
    assert [record.name for record in checkpoint.records] == ["0.0", "0.2"] and checkpoint.config is None
    assert checkpoint.selected == checkpoint.left_out == []


def test_offloaded_weights_are_refused():
    model = net()
    model[2].to("meta")
    with pytest.raises(FP8NotAvailableError, match="^2 is offloaded"):
        checkpoint_of(model)


# --- our own ------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_our_own_format_there_and_back(language_model, tmp_path):
    write(language_model, tmp_path / "out", "optimum_fp8")
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "quantization.json"]
    tensors, checkpoint = load_file(tmp_path / "out" / "model.safetensors"), checkpoint_of(language_model)
    for record in checkpoint.records:
        for name, tensor in record.tensors.items():
            stored = tensors.pop(f"{record.name}.{name}")
            found = stored.squeeze(0) if name == "weight" else stored
            assert found.dtype == tensor.dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    assert not tensors, "nothing else is written"

    said = json.loads((tmp_path / "out" / "quantization.json").read_text())
    config = FP8Config.from_dict(said)
    assert (config.mode, config.activation_scheme, config.attention) == ("LOAD", "static", True)
    assert config.modules_to_not_convert == ["lm_head"]

    read = Native().records([str(tmp_path / "out" / "model.safetensors")])
    shapes = {
        (record.name, name.rpartition(".")[2]): tuple(tensor.shape)
        for record in checkpoint.records
        for name, tensor in record.tensors.items()
        if name.endswith("_scale")
    }
    assert {(r.name, name): tuple(t.shape) for r in read.records for name, t in r.tensors.items()} == shapes
    assert all(tensor.is_meta for record in read.records for tensor in record.tensors.values())


@pytest.mark.parametrize("files", [[], ["model.bin"]])
def test_files_that_are_no_safetensors_hold_no_records(files):
    assert Native().records(files).records == []


def test_names_of_other_scales_are_not_mistaken(tmp_path):
    names = [
        "a.weight_scale",
        "b.self_attn.fp8_scales.q_scale",
        "b.self_attn.v_cache_scale",
        "c.layer_scale",
        "logit_scale",
    ]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    read = Native().records([str(tmp_path / "model.safetensors")])
    assert {record.name: set(record.tensors) for record in read.records} == {
        "a": {"weight_scale"},
        "b.self_attn": {"q_scale", "v_cache_scale"},
    }


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.fp8_scales"])
def test_unsound_scales_are_not_written(language_model, tmp_path, value, name):
    module = language_model.get_submodule(name)
    scale = module.weight_scale if hasattr(module, "weight_scale") else module.q_scale
    with torch.no_grad():
        scale.fill_(value)
    with pytest.raises(FP8CheckpointError, match=rf"^{name}\.\w+_scale is \[.*\], .*it cannot be saved"):
        write(language_model, tmp_path / "out", "optimum_fp8")
    assert os.listdir(tmp_path) == []


# --- from outside -------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_a_format_that_is_json_alone(tmp_path):
    register_format("scales", Scales())
    model = net()
    write(model, tmp_path / "a" / "out", "scales")
    assert os.listdir(tmp_path / "a" / "out") == ["quantization.json"] and os.listdir(tmp_path / "a") == ["out"]
    read = format_called("scales").records([tmp_path / "a" / "out" / "quantization.json"])
    assert [record.name for record in read.records] == ["0", "2"]
    for record in read.records:
        module = model.get_submodule(record.name)
        assert {name: scale.tolist() for name, scale in record.tensors.items()} == {
            name: scale.tolist() for name, scale in module.scales().items()
        }


def test_what_a_format_refuses_is_not_written(tmp_path):
    register_format("scales", Scales())
    with pytest.raises(FP8CheckpointError, match="^0: dynamic activations"):
        write(net(activation_scheme="dynamic"), tmp_path / "out", "scales")
    assert os.listdir(tmp_path) == []


def test_one_of_the_same_name_is_replaced():
    first, second = Scales(), Scales()
    register_format("scales", first)
    register_format("scales", second)
    assert format_called("scales") is second


def test_an_unknown_format_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(FP8ConfigError, match="format='optimum-fp8' is unknown: did you mean 'optimum_fp8'"):
        write(net(), tmp_path / "out", "optimum-fp8")
    assert os.listdir(tmp_path) == []


# --- all or nothing -----------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("step", ["tensors", "config"])
def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch, step):
    def fails(self, checkpoint):
        raise ZeroDivisionError

    monkeypatch.setattr(Native, step, fails)
    with pytest.raises(ZeroDivisionError):
        write(net(), tmp_path / "out", "optimum_fp8")
    assert os.listdir(tmp_path) == []


def test_what_is_no_json_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Native, "config", lambda self, checkpoint: {"live": object()})
    with pytest.raises(TypeError):
        write(net(), tmp_path / "out", "optimum_fp8")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [os.mkdir, lambda path: open(path, "w").close()], ids=["folder", "file"])
def test_what_exists_is_not_written_over(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(FP8CheckpointError, match="out exists: choose another folder"):
        write(net(), tmp_path / "out", "optimum_fp8")
    assert os.listdir(tmp_path) == ["out"]


def test_the_folder_can_be_read_as_others_can(tmp_path):
    write(net(), tmp_path / "out", "optimum_fp8")
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o755
