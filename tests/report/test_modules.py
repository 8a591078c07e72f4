"""How the rows of a report read: short where there are many, and in words that are not mistaken."""

import re

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.modules.handler import spoken_type
from optimum_fp8.report import format_bytes, format_share


@pytest.fixture(scope="module")
def long():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prepare(model, FP8Config(target="cpu", scale_method="maxabs_arbitrary", blocklist={"names": [r"layers\.3\.mlp"]}))
    model(torch.arange(8)[None])
    return convert(model)


@pytest.mark.core
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_repr_is_one_short_line(make):
    model = convert(make(), FP8Config(activation_scheme="dynamic", kv_cache=True))
    report = quantization_report(model)
    assert re.fullmatch(r"<QuantizationReport: \d+\.\d% of all parameters in FP8; .*; state: converted>", repr(report))
    for each in (report, *report.modules, *report.others, *report.attention):
        assert "\n" not in repr(each) and len(repr(each)) < 130
    assert len(str(report).splitlines()) > 5


def test_rows_of_a_long_table_that_differ_in_numbers_alone_stand_together(long):
    report = quantization_report(long)
    assert len(report.modules) == 8 * 7 + 1, "each is there all the same"
    lines = str(report).splitlines()
    assert len(lines) < 25
    queries = [row for row in report.modules if "q_proj" in row.name]
    (line,) = [line for line in lines if "q_proj" in line]
    assert line.split()[:4] == ["model.layers.*.self_attn.q_proj", "(8)", "Linear", "yes"]
    smallest, largest = min(row.weight_scale[0] for row in queries), max(row.weight_scale[1] for row in queries)
    assert f"{smallest:.4g} … {largest:.4g}" in line
    inputs = [row.input_scale for row in queries]
    assert f"{min(inputs):.4g} … {max(inputs):.4g}" in line
    assert format_share(sum(row.parameters for row in queries), report.size.parameters) in line


def test_what_differs_in_kind_has_a_row_of_its_own(long):
    lines = str(quantization_report(long)).splitlines()
    up = [line for line in lines if "up_proj" in line]
    assert [line.split()[:2] for line in up] == [
        ["model.layers.*.mlp.up_proj", "(7)"],
        ["model.layers.3.mlp.up_proj", "Linear"],
    ]
    assert up[1].endswith(r"blocklist name 'layers\\.3\\.mlp'")


def test_short_tables_have_a_row_for_each():
    text = str(quantization_report(convert(tiny_llama(), FP8Config(activation_scheme="dynamic"))))
    assert sum("_proj " in line for line in text.splitlines()) == 7


@pytest.mark.core
def test_conv1d_of_transformers_is_not_taken_for_that_of_torch():
    report = quantization_report(convert(tiny_gpt2(), FP8Config(activation_scheme="dynamic")))
    assert {row.type for row in report.quantized} == {"Conv1D"}, "as configurations call it"
    assert str(report).count("transformers' Conv1D") == len(report.quantized)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("transformers.pytorch_utils.Conv1D", "transformers' Conv1D"),
        ("torch.nn.modules.conv.Conv1d", "Conv1d"),
        ("torch.nn.modules.linear.Linear", "Linear"),
        ("transformers.models.falcon.modeling_falcon.FalconLinear", "FalconLinear"),
        ("diffusers.models.lora.Linear", "diffusers' Linear"),
        ("timm.layers.linear.Linear", "timm's Linear"),
    ],
)
def test_names_that_torch_has_too_are_said_with_their_package(path, text):
    assert spoken_type(path) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 10, "0.0%"), (1, 10_000, "<0.1%"), (9_999, 10_000, ">99.9%"), (10, 10, "100.0%"), (1, 3, "33.3%")],
)
def test_shares_never_round_to_nothing_or_all(part, whole, text):
    assert format_share(part, whole) == text


@pytest.mark.parametrize(
    ("count", "text"), [(28, "28 B"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**29, "2.5 GiB")]
)
def test_bytes_in_a_unit_that_suits(count, text):
    assert format_bytes(count) == text


def test_a_model_that_holds_parameters_itself():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.fc = nn.Parameter(torch.zeros(64)), nn.Linear(8, 8)

    report = quantization_report(convert(Net(), FP8Config(activation_scheme="dynamic")))
    assert [(row.names, row.parameters) for row in report.others] == [([""], 64)]
    assert "the model itself" in str(report)
