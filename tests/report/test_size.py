"""What a model holds: parameters and bytes, counted anew here from its tensors, and rows for all that holds any."""

import json
import re

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from optimum_fp8 import FP8Config, convert, prepare, quantization_report


def mixtral():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def t5():
    config = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=64)
    return T5ForConditionalGeneration(config).eval()


def plain():
    return nn.Sequential(
        nn.Embedding(10, 8), nn.LSTMCell(8, 8), nn.Bilinear(8, 8, 3), nn.LayerNorm(8), nn.Linear(8, 16)
    )


MAKERS = {"llama": tiny_llama, "gpt2, tied": tiny_gpt2, "mixtral": mixtral, "t5, shared": t5, "plain": plain}


def tensors(model):
    """Each parameter and buffer of a model once."""
    return list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def in_bytes(some):
    return sum(t.numel() * t.element_size() for t in some)


def in_fp8(model, **options):
    return convert(model, FP8Config(target="cpu", activation_scheme="dynamic", **options))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bytes_before_and_after(make, dtype):
    model = make().to(dtype)
    before, parameters = in_bytes(tensors(model)), sum(p.numel() for p in model.parameters())
    untouched = quantization_report(model)
    assert untouched.size.now == untouched.size.high_precision == before and untouched.share == 0
    report = quantization_report(in_fp8(model))
    codes = [t for t in tensors(model) if t.dtype == torch.float8_e4m3fn]
    assert report.size.high_precision == before and report.size.parameters == parameters
    assert report.size.now == in_bytes(tensors(model)) and report.size.codes == in_bytes(codes)
    weights = sum(4 * 3 if row.type == "MixtralExperts" else 1 for row in report.quantized)
    assert report.size.scales == 4 * weights
    assert report.share == sum(t.numel() for t in codes) / parameters


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_parameter_is_in_one_row(make):
    for report in (quantization_report(make()), quantization_report(in_fp8(make()))):
        rows = [*report.modules, *report.others]
        assert sum(row.parameters for row in rows) == sum(p.numel() for p in make().parameters())


@pytest.mark.core
def test_experts_show_although_nearly_all_candidates_are_in_fp8():
    assert quantization_report(in_fp8(mixtral())).share > 0.9
    report = quantization_report(in_fp8(mixtral(), blocklist={"types": ["MixtralExperts"]}))
    first, *lines = str(report).splitlines()
    share = float(re.match(r"(\d+\.\d)% of all parameters in FP8; 8 of 11 candidate modules", first)[1])
    assert share < 20
    row = next(line for line in lines if "MixtralExperts" in line)
    assert row.startswith("model.layers.0.mlp.experts") and " no " in row and "39." in row
    small = next(line for line in lines if "MixtralRMSNorm" in line)
    assert "MixtralTopKRouter" in small, "what holds little stands together"


def test_tokens_of_experts():
    model = prepare(mixtral(), FP8Config(target="cpu"))
    model(torch.arange(8)[None])
    for report in (quantization_report(model), quantization_report(convert(model))):
        experts = [row for row in report.modules if row.type == "MixtralExperts"]
        assert [sum(row.tokens_of_experts) for row in experts] == [16, 16], "each token goes to two"
        counts = [tokens for row in experts for tokens in row.tokens_of_experts]
        line = f"calibration sent {min(counts)} to {max(counts)} tokens to each of 8 experts"
        assert line in str(report) and (0 not in counts or f"none to {counts.count(0)} of 8" in str(report))
    assert all(row.intermediate_scale[0] <= row.intermediate_scale[1] for row in experts)


def test_what_no_handler_knows_has_a_row_by_class():
    report = quantization_report(in_fp8(plain()))
    others = {row.type: (row.names, row.parameters) for row in report.others}
    expected = {name: ([str(index)], sum(p.numel() for p in plain()[index].parameters())) for index, name in
                enumerate(["Embedding", "LSTMCell", "Bilinear", "LayerNorm"])}  # fmt: skip
    assert others == expected
    reasons = {row.type: row.reason for row in report.others}
    assert reasons.pop("Embedding") == "not asked for by the configuration"
    assert {*reasons.values()} == {"no kind of module that is quantized"}


@pytest.mark.parametrize("make", [tiny_gpt2, t5])
def test_tied_weights_count_once(make):
    model = in_fp8(make())
    head = next(row for row in quantization_report(model).modules if row.name == "lm_head")
    assert head.parameters == 0
    assert " shared " in next(line for line in str(quantization_report(model)).splitlines() if "lm_head" in line)


def test_parts_of_a_candidate_count_to_it():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    report = quantization_report(in_fp8(model))
    assert report.others == [] and [row.parameters for row in report.modules] == [8 * 8 + 8, 8 * 8 + 8]


def test_a_layer_that_was_added_later_was_not_asked_for():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    in_fp8(model).append(nn.Linear(8, 2))
    report = quantization_report(model)
    assert {row.type: row.reason for row in report.others} == {
        "LayerNorm": "no kind of module that is quantized",
        "Linear": "not asked for by the configuration",
    }


def test_modules_that_share_their_codes_count_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = quantization_report(in_fp8(model))
    assert report.size.codes == 64 and report.size.scales == 4 and report.share == 64 / (64 + 16)


def test_the_size_of_a_model_that_is_measured():
    model = plain()
    before = quantization_report(model).size
    assert quantization_report(prepare(model, FP8Config())).size == before
    assert "in high precision" not in str(quantization_report(model))


@pytest.mark.core
def test_a_reloaded_checkpoint_and_one_that_is_offloaded_are_as_large(tmp_path):
    model = in_fp8(tiny_llama())
    model.save_pretrained(tmp_path)
    size = quantization_report(model).size
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert quantization_report(again).size == size
    devices = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu",
               "model.rotary_emb": "cpu"}  # fmt: skip
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=devices, offload_folder=str(tmp_path / "offload")
    )
    report = quantization_report(offloaded)
    assert report.size == size and "nan" not in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_high_precision_is_what_a_cast_asks_for(dtype):
    model, twin = in_fp8(tiny_llama().half()), tiny_llama().to(dtype)
    assert quantization_report(model.to(dtype)).size.high_precision == in_bytes(tensors(twin))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, nn.Sequential], ids=lambda wrap: wrap.__name__)
def test_models_inside_others(wrap):
    model = in_fp8(plain())
    expected = quantization_report(model)
    report = quantization_report(wrap(model))
    assert (report.size.now, report.share, len(report.quantized)) == (expected.size.now, expected.share, 1)
    assert [row.type for row in report.modules] == ["Linear"]
    assert [row.type for row in report.others] == [row.type for row in expected.others]


def test_scales_of_attention_are_no_parameters():
    model = tiny_llama()
    parameters = sum(p.numel() for p in model.parameters())
    prepare(model, FP8Config(target="cpu", attention=True, kv_cache=True))
    model(torch.arange(8)[None])
    report = quantization_report(convert(model))
    assert any(row.scales for row in report.attention)
    assert report.size.parameters == parameters and not any("fp8_scales" in str(row.names) for row in report.others)
    assert report.size.now == in_bytes(tensors(model)) and report.size.scales > 4 * 2 * len(report.quantized)


def test_json_has_all_of_it():
    plain_report = json.loads(json.dumps(quantization_report(in_fp8(mixtral())).to_dict()))
    assert plain_report["bytes"]["now"] < plain_report["bytes"]["high_precision"]
    assert plain_report["parameters"] and {row["type"] for row in plain_report["others"]} >= {"MixtralTopKRouter"}
