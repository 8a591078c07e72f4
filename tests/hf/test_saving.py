"""A state dict that is given to `save_pretrained` is what is saved, and must be one of the converted model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_fp8 import FP8Config, convert
from optimum_fp8.errors import FP8CheckpointError

from .conftest import llama

NORM, CODES, SCALE = "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale"
CONFIG = FP8Config(activation_scheme="dynamic")
MAKE: dict[str, Callable[[str], PreTrainedModel]] = {
    "converted": lambda folder: convert(AutoModelForCausalLM.from_pretrained(folder), CONFIG),
    "loaded": lambda folder: AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIG),
    "head": lambda folder: convert(AutoModelForCausalLM.from_pretrained(folder), CONFIG.replace(quantize_lm_head=True)),
}


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_given_is_saved(save, ids, tmp_path, make, tied):
    model, folder = MAKE[make](save(llama(tied), torch.float32)), tmp_path / "fp8"
    given = dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in given.items()}
    given[NORM], given[SCALE] = given[NORM] * 3, given[SCALE] * 2
    model.save_pretrained(folder, state_dict=given)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.model.norm.weight, before[NORM] * 3)
    assert torch.equal(again.state_dict()[SCALE], before[SCALE] * 2)
    assert all(torch.equal(model.state_dict()[name].float(), tensor.float()) for name, tensor in before.items())
    with torch.no_grad():
        model.model.norm.weight *= 3
        model.get_submodule(SCALE.rpartition(".")[0]).weight_scale *= 2
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_by_way_of_a_compiled_model(save, tmp_path):
    model = MAKE["converted"](save(llama(), torch.float32))
    whole = torch.compile(model, backend="eager")
    given = whole.state_dict()
    given[f"_orig_mod.{NORM}"] = given[f"_orig_mod.{NORM}"] * 3
    whole.save_pretrained(tmp_path / "fp8", state_dict=given)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert torch.equal(again.model.norm.weight, model.model.norm.weight * 3)


BROKEN = {
    "high precision": (CODES, lambda codes: codes[0].bfloat16(), r"found \(torch.bfloat16, \(96, 64\)\)"),
    "another shape": (CODES, lambda codes: codes[0], r"expected \(torch.float8_e4m3fn, \(1, 96, 64\)\)"),
    "another size": (CODES, lambda codes: codes[:, 1:], r"found \(torch.float8_e4m3fn, \(1, 95, 64\)\)"),
    "no codes": (CODES, lambda codes: codes.view(torch.uint8).fill_(0x7F).view(codes.dtype), "NaN or Inf"),
    "a scale of zero": (SCALE, lambda scale: scale * 0, "it cannot be saved"),
    "another dtype": (SCALE, lambda scale: scale.bfloat16(), "torch.bfloat16"),
    "missing": (SCALE, lambda scale: None, "found nothing"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_no_fp8_state_dict_is_refused(save, tmp_path, broken):
    name, change, message = BROKEN[broken]
    model, folder = MAKE["converted"](save(llama(), torch.float32)), tmp_path / "fp8"
    given = dict(model.state_dict())
    given[name] = change(given[name].clone())
    with pytest.raises(FP8CheckpointError, match=f"{message}|{name}.*{message}"):
        model.save_pretrained(folder, state_dict={key: tensor for key, tensor in given.items() if tensor is not None})
    assert not (folder / "config.json").exists()


def test_the_state_dict_of_the_original_model_is_refused(save, tmp_path):
    folder = save(llama(), torch.float32)
    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    with pytest.raises(FP8CheckpointError, match=r"state_dict: found .*float32.*q_proj.weight.*leave state_dict out"):
        MAKE["converted"](folder).save_pretrained(tmp_path / "fp8", state_dict=original)


def test_a_process_that_writes_nothing_may_have_an_empty_one(save, tmp_path):
    model = MAKE["converted"](save(llama(), torch.float32))
    model.save_pretrained(tmp_path / "fp8", state_dict={}, is_main_process=False)
    assert not list((tmp_path / "fp8").glob("*.safetensors"))


def test_a_model_that_is_saved_while_another_one_is(save, tmp_path):
    """Each is saved with what it was given itself."""
    inner = MAKE["converted"](save(llama(), torch.float32))

    class Outer(type(inner)):
        def should_save_on_this_rank(self, *args, **options):
            inner.save_pretrained(tmp_path / "inner")
            return super().should_save_on_this_rank(*args, **options)

    outer = MAKE["converted"](save(llama(), torch.float32))
    outer.__class__ = Outer
    outer.save_pretrained(tmp_path / "outer", state_dict=outer.state_dict() | {NORM: outer.model.norm.weight * 3})
    for name, factor in {"inner": 1, "outer": 3}.items():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again.model.norm.weight, nn.Parameter(inner.model.norm.weight * factor))
