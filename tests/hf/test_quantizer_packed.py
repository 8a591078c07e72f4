"""Weights that a backend has laid out anew: what is saved, moved, copied and restored is what it would be without."""

from __future__ import annotations

import copy

import pytest
import torch
from hf.conftest import llama
from safetensors.torch import load_file

from optimum_fp8 import FP8Config, convert, dequantize, ops
from optimum_fp8.modules import fp8_modules
from optimum_fp8.test_utils import gaudi


@pytest.fixture
def packed():
    """A Llama converted over an emulated Gaudi, and the same without."""
    config = FP8Config(target="gaudi2", activation_scheme="dynamic", scale_method="maxabs_pow2")
    model = llama()
    plain = convert(copy.deepcopy(model), config)
    with gaudi.emulated("gaudi2"), ops.backend("hpu"):
        convert(model, config)
    assert all(module.codes.t().is_contiguous() for module in fp8_modules(model).values())
    return model, plain


def agree(*models) -> bool:
    """Whether models compute the same; kernels for the layouts of weights sum up in different orders."""
    x = torch.randint(50, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (model(x).logits.float() for model in models)
    return torch.allclose(first, second, atol=2e-3 * float(second.abs().max()))


def test_memory_holds_one_copy_of_a_weight(packed):
    for module in fp8_modules(packed[0]).values():
        assert module.codes.untyped_storage().nbytes() == module.codes.numel()


def test_checkpoints_are_the_same_bytes(packed, tmp_path):
    for name, model in zip(("packed", "plain"), packed, strict=True):
        model.save_pretrained(tmp_path / name)
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "plain"))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name].view(torch.uint8), plain[name].view(torch.uint8)) for name in ours)
    again = type(packed[0]).from_pretrained(tmp_path / "packed")
    assert all(module.codes.is_contiguous() for module in fp8_modules(again).values())


def test_a_state_dict_goes_there_and_back(packed, tmp_path):
    torch.save(packed[0].state_dict(), tmp_path / "state.pt")
    other = convert(llama(), FP8Config(target="gaudi2", activation_scheme="dynamic", scale_method="maxabs_pow2"))
    assert not agree(other, packed[1])
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert agree(other, packed[1])


def test_a_copy_knows_its_constants():
    config = FP8Config(target="gaudi2", activation_scheme="dynamic", scale_method="maxabs_hw")
    with gaudi.emulated("gaudi2"), ops.backend("hpu"):
        model = convert(llama(), config)
        known = [ops.constant_of(module.weight_scale) for module in fp8_modules(model).values()]
        copied = [ops.constant_of(module.weight_scale) for module in fp8_modules(copy.deepcopy(model)).values()]
    assert copied == known and None not in known and known


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: model.to("cpu")], ids=["copy", "move"])
def test_copies_and_moves(packed, change):
    assert agree(change(packed[0]), packed[1])


def test_dequantized_weights_are_contiguous_and_the_same(packed):
    weights, plain = (dict(dequantize(model).named_parameters()) for model in packed)
    assert all(torch.equal(weights[name], plain[name]) and weights[name].is_contiguous() for name in plain)
