"""Checkpoints of ours that were edited are refused, and name what was edited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf.conftest import llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from unsealed import unsealed

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8CheckpointError, FP8ConfigError
from optimum_fp8.formats import not_finite

UP = "model.layers.1.mlp.up_proj"
ATTENTION = "model.layers.1.self_attn.fp8_scales"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of checkpoints by the options they were quantized with: each is made once."""
    return tmp_path_factory.mktemp("made"), {}


@pytest.fixture
def checkpoint(made, batches, tmp_path):
    """Quantize a tiny model with some options, and return a copy of what it was saved as."""
    folder, known = made

    def make(**options) -> str:
        key = repr(options)
        if key not in known:
            known[key] = str(folder / str(len(known)))
            torch.manual_seed(0)
            llama().to(torch.bfloat16).save_pretrained(folder / "model")
            static = options.get("activation_scheme", "static") == "static"
            config = FP8Config(target="cpu", dataset=batches if static else None, **options)
            model = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config)
            model.save_pretrained(known[key])
        shutil.copytree(known[key], tmp_path / "fp8")
        return str(tmp_path / "fp8")

    return make


def edit_tensors(folder: str, change, *, keep_record: bool = True) -> None:
    path = Path(folder) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=unsealed(metadata) if keep_record else {"format": "pt"})


def forget_record(folder: str) -> None:
    """What a tool that copies tensors alone makes of a checkpoint."""
    edit_tensors(folder, lambda tensors: None, keep_record=False)


def edit_config(folder: str, **changes) -> None:
    path = Path(folder) / "config.json"
    said = json.loads(path.read_text())
    said["quantization_config"] |= changes
    path.write_text(json.dumps(said))


def refused(folder: str, message: str, error=FP8CheckpointError) -> None:
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_was_not_edited_loads_with_and_without_its_record(checkpoint, ids):
    folder = checkpoint(attention=True, kv_cache=True)
    first = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    forget_record(folder)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, first)
    assert AutoModel.from_pretrained(folder)(ids).last_hidden_state.isfinite().all()


# --- codes ----------------------------------------------------------------------------------------------------------


def test_every_code_that_is_no_number_is_known():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for code in torch.arange(256, dtype=torch.uint8).view(dtype):
            assert not_finite(code[None]) is not bool(code.float().isfinite())
    assert not not_finite(torch.empty(0, dtype=torch.float8_e4m3fn))
    assert not not_finite(torch.empty(3, dtype=torch.float8_e4m3fn, device="meta"))


@pytest.mark.core
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_nan(checkpoint, code):
    folder = checkpoint(activation_scheme="dynamic")
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8)[0, 3, 5].fill_(code))
    refused(folder, rf"{UP}: found codes that are NaN")


@pytest.mark.parametrize("code", [0x7C, 0xFD])
def test_codes_of_e5m2_that_are_infinite_or_nan(checkpoint, code):
    folder = checkpoint(activation_scheme="dynamic", fp8_config="E5M2")
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8)[0, 3, 5].fill_(code))
    refused(folder, rf"{UP}: found codes that are NaN or Inf")


# --- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [f"{UP}.weight_scale", f"{UP}.input_scale", f"{ATTENTION}.q_scale"])
def test_scales_that_are_not_float32(checkpoint, name, dtype):
    folder = checkpoint(attention=True)
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, rf"{name} is \w+ in the checkpoint, expected F32")


@pytest.mark.parametrize("name", [f"{UP}.weight_scale", f"{UP}.input_scale"])
@pytest.mark.parametrize("shape", [(96, 1), (96,), (1, 1), ()])
def test_scales_of_another_granularity(checkpoint, name, shape):
    folder = checkpoint()
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
    refused(folder, rf"{name} has shape .*expected \(1,\)")


@pytest.mark.parametrize("name, shape", [("q_scale", (4, 1, 1)), ("p_scale", (4, 1, 1)), ("k_scale", (2,))])
def test_scales_of_attention_of_another_granularity(checkpoint, name, shape):
    folder = checkpoint(attention=True)
    edit_tensors(folder, lambda tensors: tensors.update({f"{ATTENTION}.{name}": torch.ones(shape)}))
    refused(folder, rf"self_attn\.fp8_scales\.{name} has shape .*expected \(1,\)")


@pytest.mark.core
@pytest.mark.parametrize("name", ["k_cache_scale", "q7_scale", "input_scale", "z_scale"])
@pytest.mark.parametrize("keep_record", [True, False])
def test_scales_that_attention_does_not_have(checkpoint, name, keep_record):
    folder = checkpoint(attention=True)
    more = {f"{ATTENTION}.{name}": torch.ones(1)}
    edit_tensors(folder, lambda tensors: tensors.update(more), keep_record=keep_record)
    refused(folder, rf"self_attn\.fp8_scales\.{name} is")


@pytest.mark.parametrize("name", ["q_scale", "p_scale", "output_scale"])
def test_scales_that_attention_lacks(checkpoint, name):
    folder = checkpoint(attention=True)
    edit_tensors(folder, lambda tensors: tensors.pop(f"{ATTENTION}.{name}"), keep_record=False)
    refused(folder, rf"lacks 1 tensors .*fp8_scales\.{name}")


def test_scales_of_no_module(checkpoint):
    folder = checkpoint()
    more = {"model.layers.1.mlp.gone.weight_scale": torch.ones(1)}
    edit_tensors(folder, lambda tensors: tensors.update(more))
    refused(folder, r"mlp\.gone\.weight_scale is the scale of no weight")


# --- the configuration ----------------------------------------------------------------------------------------------

PER_CHANNEL = {"overrides": {"up_proj$": {"scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2"}}}
DYNAMIC_PART = {"activation_scheme": "static", "overrides": {"up_proj$": {"activation_scheme": "dynamic"}}}


@pytest.mark.core
@pytest.mark.parametrize(
    "options, edited, message",
    [
        ({}, {"activation_scheme": "dynamic"}, "input_scale is in the checkpoint, but its configuration has no such"),
        ({}, {"activation_scheme": "weight_only"}, "input_scale is in the checkpoint"),
        ({"activation_scheme": "dynamic"}, {"activation_scheme": "static"}, r"lacks 14 tensors .*input_scale"),
        ({}, {"fp8_config": "E5M2"}, "found .*float8_e4m3fn.* expected .*float8_e5m2"),
        (PER_CHANNEL, {"overrides": []}, r"up_proj\.weight_scale has shape \(96, 1\)"),
        (DYNAMIC_PART, {"overrides": []}, r"lacks 2 tensors .*up_proj\.input_scale"),
        ({}, {"modules_to_not_convert": ["lm_head", UP]}, rf"{UP}\.\w+_scale is .*leaves {UP} in high precision"),
        ({"modules_to_not_convert": [UP]}, {"modules_to_not_convert": ["lm_head"]}, rf"{UP}: found .*bfloat16"),
        ({"attention": True}, {"attention": False}, r"fp8_scales\.\w+ is .*leaves model.layers.0.self_attn in high"),
        ({}, {"attention": True}, r"lacks 10 tensors .*fp8_scales"),
        ({"attention": True}, {"attention_dataflow": "unfused"}, "output_scale is in the checkpoint"),
        ({"attention": True}, {"activation_scheme": "dynamic"}, "is in the checkpoint, but its configuration has no"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_tensors(checkpoint, options, edited, message):
    folder = checkpoint(**options)
    edit_config(folder, **edited)
    refused(folder, f"made with {next(iter(edited))}=|{message}")
    forget_record(folder)
    refused(folder, message)


@pytest.mark.core
@pytest.mark.parametrize(
    "options, edited",
    [
        ({"activation_scheme": "dynamic"}, {"activation_scheme": "weight_only"}),
        ({"activation_scheme": "weight_only"}, {"activation_scheme": "dynamic"}),
        ({}, {"scale_method": "maxabs_pow2"}),
        ({}, {"target": "gaudi3"}),
        ({}, {"use_qdq": True}),
        ({"overrides": {"up_proj$": {"use_qdq": True}}}, {"overrides": []}),
        ({}, {"overrides": [["up_proj$", {"hp_dtype": "fp32"}]]}),
        ({"kv_cache": True, "activation_scheme": "dynamic"}, {"kv_cache": False}),
        ({}, {"format_version": 1}),
    ],
    ids=str,
)
def test_what_the_tensors_do_not_tell_the_record_does(checkpoint, options, edited):
    folder = checkpoint(**options)
    edit_config(folder, **edited)
    refused(folder, f"was made with {next(iter(edited))}=.*, but the configuration of the checkpoint says")


@pytest.mark.parametrize(
    "edited", [{"num_calibration_samples": 3}, {"dump_stats_path": "/home/someone/ranges/m"}, {"mode": "AUTO"}]
)
def test_keys_that_say_nothing_of_what_is_computed_may_be_edited(checkpoint, edited):
    folder = checkpoint(activation_scheme="dynamic")
    edit_config(folder, **edited)
    AutoModelForCausalLM.from_pretrained(folder)


def test_the_target_may_be_chosen_while_loading_as_ever(checkpoint):
    folder = checkpoint(activation_scheme="dynamic")
    for target in ("gaudi2", "gaudi3"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(target=target))


def test_versions_from_the_future(checkpoint):
    folder = checkpoint(activation_scheme="dynamic")
    path = Path(folder) / "model.safetensors"
    newer = {"format": "pt", "optimum_fp8": json.dumps({"format_version": 99})}
    save_file(load_file(path), path, metadata=newer)
    refused(folder, "written by a newer optimum_fp8: upgrade")
    edit_config(folder, format_version=99)
    refused(folder, "newer optimum_fp8", FP8ConfigError)


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"format_version": "two"}'])
def test_a_record_that_is_damaged(checkpoint, text):
    folder = checkpoint(activation_scheme="dynamic")
    path = Path(folder) / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "optimum_fp8": text})
    refused(folder, "the metadata 'optimum_fp8' of .*model.safetensors cannot be read")


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_a_checkpoint_tells_no_path_of_the_machine_it_was_made_on(save, tokenizer, tmp_path):
    path = save(llama())
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("some words of text\n\n" * 50)
    config = FP8Config(
        dataset=str(tmp_path / "text.txt"),
        tokenizer=str(tmp_path / "tokenizer"),
        processor=str(tmp_path / "processor"),
        dump_stats_path=str(tmp_path / "ranges" / "m"),
        num_calibration_samples=1,
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    again.save_pretrained(tmp_path / "again")
    again.config.save_pretrained(tmp_path / "config")
    files = [file for folder in ("fp8", "again", "config") for file in (tmp_path / folder).iterdir()]
    assert len(files) >= 5
    for file in files:
        assert str(tmp_path).encode() not in file.read_bytes(), file
    said = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert [said[key] for key in ("dataset", "tokenizer", "processor")] == [None] * 3
    assert said["dump_stats_path"] == FP8Config().dump_stats_path


def test_a_checkpoint_that_holds_paths_still_loads_and_loses_them(checkpoint, ids, tmp_path):
    folder = checkpoint()
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    edit_config(folder, dump_stats_path="/home/someone/m", tokenizer="/home/someone/t")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FP8Config(dump_stats_path=str(tmp_path / "elsewhere" / "m"))
    )
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "again")
    assert b"someone" not in (tmp_path / "again" / "config.json").read_bytes()
