"""Writing to the weight of an FP8 module, as peft does to merge adapters: quantized again, and taken back exactly."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, FP8NotAvailableError, FP8ScaleError, FP8StateError, convert, quantization_report
from optimum_fp8.modules.weight import DequantizedWeight
from optimum_fp8.scales import PerBlock, PerTensor, ScaleMethod, ScaleRule, register_method

KINDS = {
    "Linear": lambda: nn.Linear(48, 32),
    "Conv1D": lambda: Conv1D(32, 48),
    "Conv2d": lambda: nn.Conv2d(8, 16, 3),
    "Embedding": lambda: nn.Embedding(24, 16),
}
CONFIG = {"activation_scheme": "weight_only", "scale_method": "maxabs_arbitrary"}
CONFIG |= {"quantize_embeddings": True, "quantize_lm_head": True}

pytestmark = pytest.mark.filterwarnings("ignore:weights of FP8 modules were written to")


def fp8(module: nn.Module, **options) -> nn.Sequential:
    return convert(nn.Sequential(module).eval(), FP8Config(**CONFIG | options))


def with_adapters(model: nn.Module, *more: str, **options):
    """A PeftModel whose adapters, "default" and `more`, are not zero."""
    options = {"target_modules": ["0"], "r": 4, "init_lora_weights": False, **options}
    adapted = get_peft_model(model, LoraConfig(**options))
    for name in more:
        adapted.add_adapter(name, LoraConfig(**options))
    return adapted.eval()


def bits(module) -> tuple[torch.Tensor, torch.Tensor]:
    return module.codes.detach().view(torch.uint8).clone(), module.weight_scale.detach().clone()


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_weight_is_the_sum_quantized_by_the_conversion(kind, safe_merge):
    module = KINDS[kind]()
    adapted = with_adapters(fp8(copy.deepcopy(module)))
    layer = adapted.base_model.model[0]
    held, before = layer.base_layer.codes, bits(layer.base_layer)
    plain = copy.deepcopy(module)
    with torch.no_grad():
        plain.weight.copy_(layer.base_layer.weight)
        plain.weight += layer.get_delta_weight("default")
    adapted.merge_adapter(safe_merge=safe_merge)
    assert same(bits(layer.base_layer), bits(fp8(plain)[0])) and layer.base_layer.codes is held
    assert not same(bits(layer.base_layer), before)
    values = layer.base_layer.weight.float() - plain.weight.float()
    assert layer.base_layer.requantized == pytest.approx(float(values.norm() / plain.weight.float().norm()), rel=1e-3)
    adapted.unmerge_adapter()
    assert same(bits(layer.base_layer), before) and layer.base_layer.requantized is None
    adapted.merge_adapter(safe_merge=safe_merge)
    assert same(bits(adapted.merge_and_unload()[0]), bits(fp8(plain)[0]))


def test_several_adapters_come_off_in_turn():
    adapted = with_adapters(fp8(nn.Linear(48, 32)), "other")
    layer = adapted.base_model.model[0]
    before = bits(layer.base_layer)
    adapted.merge_adapter(["default", "other"])
    clone = copy.deepcopy(adapted)
    for each in (adapted, clone):
        each.unmerge_adapter()
        assert same(bits(each.base_model.model[0].base_layer), before)
    adapted.merge_adapter()
    x = torch.randn(3, 48)
    with torch.no_grad(), adapted.disable_adapter():  # takes merged ones off
        adapted(x)
    assert same(bits(layer.base_layer), before)


def test_an_adapter_that_was_trained_meanwhile_does_not_bring_back_the_former_weight():
    adapted = with_adapters(fp8(nn.Linear(48, 32)))
    layer = adapted.base_model.model[0]
    before = bits(layer.base_layer)
    adapted.merge_adapter()
    layer.lora_B["default"].weight.data *= 3  # so that another matrix comes off than was added
    adapted.unmerge_adapter()
    assert not same(bits(layer.base_layer), before) and layer.base_layer.requantized > 0.01


def test_the_former_weight_is_kept_no_longer_than_the_adapter():
    model = with_adapters(fp8(nn.Linear(48, 32))).merge_and_unload()
    assert not [key for key in vars(model[0]) if "former" in key]


def test_pissa_leaves_the_rest_in_fp8():
    torch.manual_seed(0)
    model, x = fp8(nn.Linear(48, 32)), torch.randn(5, 48)
    expected = model(x).float()
    adapted = with_adapters(model, init_lora_weights="pissa")
    assert ((adapted(x).float() - expected).norm() / expected.norm()).item() < 0.05
    adapted.merge_adapter()
    assert ((adapted(x).float() - expected).norm() / expected.norm()).item() < 0.07


def test_dora_is_merged():
    model, x = fp8(nn.Linear(48, 32)), torch.randn(5, 48)
    adapted = with_adapters(model, use_dora=True)
    with torch.no_grad():
        expected = adapted(x).float()
        adapted.merge_adapter()
        assert ((adapted(x).float() - expected).norm() / expected.norm()).item() < 0.06


def test_values_are_assigned_and_added_to():
    module, values = fp8(nn.Linear(48, 32))[0], torch.randn(32, 48)
    expected = nn.Linear(48, 32)
    expected.weight.data = values.clone()
    module.weight.data = values
    assert same(bits(module), bits(fp8(copy.deepcopy(expected))[0]))
    data = module.weight.data
    data += values
    expected.weight.data = module.dequantized_weight(torch.float32)  # what `data` wrote is here already
    assert data.tolist() == module.weight.tolist() and module.weight.abs().max() > 1.5 * values.abs().max()
    data -= module.weight
    assert not module.weight.any()


def test_modules_that_share_a_weight_go_on_sharing_it():
    shared = nn.Linear(16, 16, bias=False)
    model = convert(nn.Sequential(shared, nn.ReLU(), copy.copy(shared)), FP8Config(**CONFIG))
    assert model[0].codes is model[2].codes
    model(torch.randn(2, 16))
    model[0].weight.data += 1.0
    assert model[0].codes is model[2].codes and torch.equal(model[2].weight, model[0].weight)
    x = torch.randn(2, 16)
    assert torch.equal(model[0](x), model[2](x))


def test_scales_by_blocks_of_a_transposed_weight():
    rule = ScaleRule(PerBlock(128, 128), "maxabs", "identity")
    register_method(ScaleMethod("blocks", rule, ScaleRule(PerTensor(), "maxabs", "identity")))
    module = fp8(Conv1D(130, 140), scale_method="blocks")[0]
    before = module.weight.clone()
    assert type(module.weight) is DequantizedWeight and type(before) is torch.Tensor
    module.weight.data += 1.0
    torch.testing.assert_close(module.weight + 0, before + 1, rtol=0.07, atol=0.01)


def test_it_says_so_with_the_error():
    model = fp8(nn.Linear(48, 32))
    with pytest.warns(
        UserWarning, match=r"written to.*quantization_report\(model\) gives the error of each.*merge_lora"
    ):
        model[0].weight.data += 0.1
    (row,) = quantization_report(model).modules
    assert row.reason == f"quantized again, with an error of {100 * model[0].requantized:.1f} %"
    assert row.reason in str(quantization_report(model))


WRONG = {
    "shape": (torch.ones(48, 32), FP8StateError, r"0: values of shape \(48, 32\).*expected \(32, 48\)"),
    "NaN": (torch.full((32, 48), torch.nan), FP8ScaleError, "0: the weight holds NaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_change_nothing(case):
    values, error, text = WRONG[case]
    module = fp8(nn.Linear(48, 32))[0]
    before = bits(module)
    with pytest.raises(error, match=text), warnings.catch_warnings():
        module.weight.data = values
    assert same(bits(module), before)


def test_weights_that_are_not_here_or_follow_from_others_are_refused():
    module = fp8(nn.Linear(48, 32))[0].to("meta")
    with pytest.raises(FP8NotAvailableError, match=r"0: .*offloaded.*merge_lora"):
        module.weight.data = torch.ones(32, 48)
    module = fp8(weight_norm(nn.Linear(48, 32)))[0]
    with pytest.raises(FP8NotAvailableError, match=r"0: .*follows from.*convert it again"):
        module.weight.data = torch.ones(32, 48)
