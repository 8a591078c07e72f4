"""Weights against the model they were made of."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from verifying.conftest import UP, changed, edit, told

from optimum_fp8 import FP8Config, export
from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.verifying.against import dequantized, errors_against
from optimum_fp8.verifying.layers import layers_in
from optimum_fp8.verifying.opened import open_folder

OTHERS = {"format": "pt"}


@pytest.mark.parametrize("name", ["ours", "compressed-tensors"])
def test_what_rounding_explains(made, name):
    assert told(made[name], against=made["base"]) == []
    opened = open_folder(made[name])
    errors = errors_against(opened, layers_in(opened), made["base"])
    assert len(errors) == 7 and all(0.01 < each.relative < 0.06 for each in errors)


@pytest.mark.parametrize("factor", [0.5, 0.97, 1.03, 2.0])
def test_a_scale_that_is_wrong(copied, made, factor):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors[f"{UP}.weight_scale"].mul_(factor), OTHERS)
    assert told(folder) == []  # by itself it looks sound
    found = told(folder, against=made["base"])
    assert len(found) == 1 and f"error: {UP}.weight: found a relative error of" in found[0]


def test_a_single_code_that_is_wrong(copied, made):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8)[0, 0].bitwise_xor_(0x80), OTHERS)
    assert any(UP in each for each in told(folder, against=made["base"]))


def test_another_base_has_none_of_its_weights(made, tmp_path):
    with pytest.raises(FP8CheckpointError, match="has none of the weights"):
        told(made["ours"], against=made["ours"])


@pytest.mark.parametrize("shape", [(1,), (6, 1), (3, 2), (2, 2)])
def test_scales_are_spread_over_their_values(shape):
    codes = torch.randn(6, 4).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 1
    found = dequantized(codes, scale)
    for row in range(6):
        for column in range(4):
            at = scale.flatten()[0] if shape == (1,) else scale[row * shape[0] // 6, column * shape[1] // 4]
            assert found[row, column] == codes.float()[row, column] * at


@pytest.mark.parametrize("sibling, factor, is_sound", [(1, 1.05, True), (1, 1.1, False), (1.5, 1.05, False)])
def test_layers_that_share_a_scale(copied, made, sibling, factor, is_sound):
    folder, gate = copied("compressed-tensors"), UP.replace("up_proj", "gate_proj")
    for name in (gate, UP):  # as they are with scales of their own
        changed(folder, f"{name}.weight_scale", lambda _: torch.ones(1))
        original = load_file(made["base"] / "model.safetensors")[f"{name}.weight"].float()
        changed(folder, f"{name}.weight", lambda _, own=original: (own * 64).to(torch.float8_e4m3fn))
    changed(folder, f"{UP}.weight_scale", lambda _: torch.tensor([factor / 64]))
    changed(folder, f"{gate}.weight_scale", lambda _: torch.tensor([factor / 64 * sibling]))
    opened = open_folder(folder)
    errors = {each.layer: each for each in errors_against(opened, layers_in(opened), made["base"])}
    assert errors[f"{UP}.weight"].factor == pytest.approx(1 / factor, rel=0.005)
    assert errors[f"{UP}.weight"].is_explained is is_sound


def test_square_weights_that_are_stored_as_in_out(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_inner=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    config = FP8Config(activation_scheme="weight_only")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base", quantization_config=config)
    model.save_pretrained(tmp_path / "ours")
    assert told(tmp_path / "ours", against=tmp_path / "base") == []


def test_scales_by_blocks_whose_last_is_smaller():
    scale = torch.rand(2, 3) + 1
    found = dequantized(torch.ones(192, 300).to(torch.float8_e4m3fn), scale)
    assert torch.equal(found, scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :300])


def test_halves_of_experts():
    scale = torch.rand(4, 2, 1) + 1
    found = dequantized(torch.ones(4, 96, 32).to(torch.float8_e4m3fn), scale)
    assert torch.equal(found, scale.repeat_interleave(48, 1).expand(4, 96, 32))


@pytest.fixture(scope="module")
def by_blocks(tmp_path_factory):
    """The folders of a model in blocks, and of its export for ModelOpt."""
    folder = tmp_path_factory.mktemp("blocks")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, bos_token_id=1))
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    config = FP8Config.preset("FP8_BLOCK")
    model = LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=config)
    model.save_pretrained(folder / "ours")
    export(folder / "ours", folder / "modelopt", "modelopt")
    return folder


def test_blocks_of_modelopt(by_blocks, tmp_path):
    folder = by_blocks / "modelopt"
    assert open_folder(folder).tensors[f"{UP}.weight_scale"].shape == (2, 1, 1, 1)
    assert told(folder) == [] == told(folder, against=by_blocks / "base")
    flat = shutil.copytree(folder, tmp_path / "flat")
    edit(
        flat,
        lambda tensors: tensors.update({f"{UP}.weight_scale": tensors[f"{UP}.weight_scale"].reshape(2, 1)}),
        OTHERS,
    )
    assert told(flat, against=by_blocks / "base") == []


def test_a_scale_of_no_shape_that_fits_is_told_once(copied, made):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors.update({f"{UP}.weight_scale": torch.rand(64, 1, 1, 1, 2)}), OTHERS)
    (found,) = [each for each in told(folder, against=made["base"]) if UP in each]
    assert f"error: {UP}.weight_scale: found a scale of shape (64, 1, 1, 1, 2)" in found


def test_the_files_are_left_as_they_were(made):
    before = {path: load_file(path).keys() for path in made["ours"].glob("*.safetensors")}
    told(made["ours"], against=made["base"])
    assert {path: load_file(path).keys() for path in made["ours"].glob("*.safetensors")} == before
