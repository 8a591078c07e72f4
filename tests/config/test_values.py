"""What each key of FP8Config accepts, and what it makes of it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config
from optimum_fp8.config import KEYS
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError
from optimum_fp8.scales import INC_METHODS

INC_SCALE_METHODS = [
    "unit_scale",
    "hw_aligned_single_scale",
    "maxabs_hw",
    "maxabs_pow2",
    "maxabs_arbitrary",
    "maxabs_hw_opt_weight",
    "maxabs_pow2_opt_weight",
    "act_maxabs_hw_weights_pcs_maxabs_pow2",
    "act_maxabs_hw_weights_pcs_opt_pow2",
    "act_maxabs_pow2_weights_pcs_maxabs_pow2",
    "act_maxabs_pow2_weights_pcs_opt_pow2",
    "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw",
    "maxabs_pcs_pow2",
]


@pytest.mark.parametrize("name", INC_SCALE_METHODS)
def test_every_scale_method_of_inc_is_accepted_in_any_case(name):
    assert FP8Config(scale_method=name).scale_method == name
    assert FP8Config(scale_method=name.upper()).scale_method == name


def test_no_scale_method_is_forgotten():
    assert set(INC_METHODS) == set(INC_SCALE_METHODS)


@pytest.mark.core
@pytest.mark.parametrize(
    "key, value, canonical",
    [
        ("fp8_config", "e5m2", "E5M2"),
        ("hp_dtype", "BF16", "bf16"),
        ("hp_dtype", "torch.bfloat16", "bf16"),
        ("hp_dtype", torch.float16, "fp16"),
        ("hp_dtype", "float32", "fp32"),
        ("observer", "MaxAbs", "maxabs"),
        ("mode", "measure", "MEASURE"),
        ("mode", "Load", "LOAD"),
        ("measure_exclude", "none", "NONE"),
        ("measure_exclude", "Params", "PARAMS"),
        ("scale_format", "CONST", "const"),
        ("use_qdq", "True", True),
        ("dynamic_quantization", "false", False),
        ("target", "GAUDI2", "gaudi2"),
        ("activation_scheme", "Weight_Only", "weight_only"),
        ("dump_stats_path", Path("stats") / "measure", "stats/measure"),
        ("dump_stats_path", "measure", "measure"),
        ("dataset", Path("texts.txt"), "texts.txt"),
        ("input_backoff", 1, 1.0),
        ("modules_to_not_convert", ("lm_head", "score"), ["lm_head", "score"]),
        ("allowlist", None, {"names": [], "types": []}),
        ("allowlist", {"names": ["q_proj"]}, {"names": ["q_proj"], "types": []}),
        ("allowlist", {"types": [nn.Linear, "X"]}, {"names": [], "types": ["torch.nn.modules.linear.Linear", "X"]}),
        ("blocklist", {"types": (Conv1D,)}, {"names": [], "types": ["transformers.pytorch_utils.Conv1D"]}),
        ("blocklist", {"types": ["Matmul", "KVCache"]}, {"names": [], "types": ["Matmul", "KVCache"]}),
    ],
)  # fmt: skip
def test_values_are_brought_to_one_form(key, value, canonical):
    found = KEYS[key].normalize(value)
    assert found == canonical and type(found) is type(canonical)
    assert KEYS[key].normalize(found) == found


@pytest.mark.parametrize(
    "key, value, hint",
    [
        ("fp8_config", "E4M4", "did you mean 'E4M3'"),
        ("fp8_config", None, "valid: E4M3, E5M2"),
        ("hp_dtype", "bf61", "did you mean 'bf16'"),
        ("hp_dtype", torch.int8, "valid: bf16, fp16, fp32"),
        ("observer", "maxab", "did you mean 'maxabs'"),
        ("mode", "QUANTISE", "did you mean 'QUANTIZE'"),
        ("dump_stats_path", "", "expected a folder and a file prefix"),
        ("dump_stats_path", "stats/", "expected a folder and a file prefix"),
        ("dump_stats_path", 3, "expected a folder and a file prefix"),
        ("scale_method", "maxabs_pow", "did you mean 'maxabs_pow2'"),
        ("scale_method", None, "valid: unit_scale"),
        ("measure_exclude", "OUTPUTS", "did you mean 'OUTPUT'"),
        ("input_backoff", 0, "expected 0 < input_backoff <= 1"),
        ("input_backoff", 1.5, "expected 0 < input_backoff <= 1"),
        ("weight_backoff", float("nan"), "expected 0 < weight_backoff <= 1"),
        ("weight_backoff", True, "expected 0 < weight_backoff <= 1"),
        ("scale_format", "constant", "did you mean 'const'"),
        ("use_qdq", "yes", "expected True or False"),
        ("quantize_lm_head", 1, "expected True or False"),
        ("target", "gaudi", "did you mean 'gaudi"),
        ("activation_scheme", "dynamc", "did you mean 'dynamic'"),
        ("num_calibration_samples", 0, "expected a whole number above 0"),
        ("max_seq_length", 1.5, "expected a whole number above 0"),
        ("batch_size", True, "expected a whole number above 0"),
        ("text_column", "", "expected a non-empty string"),
        ("modules_to_not_convert", "lm_head", "expected a list of module names"),
        ("modules_to_not_convert", [3], "expected a list of module names"),
        ("allowlist", ["q_proj"], "expected {'names': [...], 'types': [...]}"),
        ("allowlist", {"name": []}, "did you mean 'names'"),
        ("allowlist", {"names": "q_proj"}, "expected a list"),
        ("blocklist", {"names": ["("]}, "not a regular expression"),
        ("blocklist", {"names": [3]}, "not a regular expression"),
        ("blocklist", {"types": [3]}, "expected classes or class names"),
    ],
)
def test_bad_values_are_refused_with_what_is_valid(key, value, hint):
    with pytest.raises(FP8ConfigError) as error:
        FP8Config(**{key: value})
    assert key in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("dataset", [42, True, b"text", torch.zeros(2, 3)])
def test_a_dataset_that_cannot_be_one_is_refused_at_once(dataset):
    with pytest.raises(ValueError, match="dataset"):
        FP8Config(dataset=dataset)


@pytest.mark.core
@pytest.mark.parametrize(
    "options",
    [
        {"observer": "shape"},
        {"mode": "SHAPE"},
        {"scale_method": {"default": {"weight": {"params": {"weight_scales": [1.0]}}}}},
        {"allowlist": {"types": ["EmbeddingBag"]}},
        {"allowlist": {"types": ["Linear", "EmbeddingBag"]}},
        {"allowlist": {"types": ["torch.nn.EmbeddingBag"]}},
        {"allowlist": {"types": ["BMM"]}},
    ],
    ids=str,
)
def test_what_inc_has_and_we_do_not_have_yet_says_so(options):
    with pytest.raises(FP8NotAvailableError, match="not available in optimum_fp8 yet"):
        FP8Config(**options)
