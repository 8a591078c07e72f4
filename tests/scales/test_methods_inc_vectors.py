"""Our scales against those of Intel Neural Compressor's own code (`tests/data/inc_scales.json` says how it was run).

They are equal, bit for bit, but for one difference, proved case by case and counted ("reciprocal"): for per-tensor
scales on Gaudi, INC on a CPU divides; the cards multiply by the reciprocal rounded to bfloat16, and we do as the cards.
"""

import json
import math
from collections import Counter
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from optimum_fp8 import ops
from optimum_fp8.formats import number_format
from optimum_fp8.rounding import round_scale
from optimum_fp8.scales import (
    INC_METHODS,
    SCALE_METHODS,
    PerToken,
    activation_scale,
    scale_method,
    weight_scale,
)

pytestmark = pytest.mark.core

FULL_SCALE = {("gaudi2", "E4M3"): 240, ("gaudi3", "E4M3"): 448, ("cpu", "E4M3"): 448}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FP8 = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


@cache
def vectors(kind):
    text = (Path(__file__).parents[1] / "data" / "inc_scales.json").read_text()
    return [v for v in json.loads(text)["vectors"] if v["kind"] == kind and "expected" in v]


def bf16(value):
    return np.float32(value).astype(ml_dtypes.bfloat16)


def by_hand(rule, maxabs, method, target, fp8, backoff):
    """A per-tensor scale with the "division" or the "reciprocal" rule, in numpy alone."""
    divisor = FULL_SCALE.get((target, fp8), 57344) * backoff
    if rule == "division":
        raw = bf16(np.float32(bf16(maxabs)) / np.float32(divisor))
    else:
        raw = bf16(np.float32(bf16(maxabs)) * np.float32(bf16(1 / divisor)))
    if method == "maxabs_arbitrary":
        return float(raw)
    exponent = math.ceil(bf16(np.log2(np.float32(raw))))
    if "hw" in method.split("_")[:3]:
        low, high, step = (-8, 4, 4) if target == "gaudi2" else (-55, 7, 1)
        exponent = min(max(step * math.ceil(exponent / step), low), high)
    return 2.0**exponent


def verdict(ours, expected, maxabs, case, backoff):
    """Why `ours` may be what it is: "equal", the "reciprocal" of above, or a message that no test expects."""
    if ours == expected:
        return "equal"
    target = case["device"]
    rules = [by_hand(rule, maxabs, case["method"], target, case["fp8"], backoff) for rule in ("reciprocal", "division")]
    if target.startswith("gaudi") and np.size(expected) == 1 and [*np.ravel(ours), *np.ravel(expected)] == rules:
        return "reciprocal"
    return f"{case}: {ours} is not {expected} ({rules=})"


def weight_of(seed, shape, std, dtype, row_scale=None, zero_row=None, outlier=None):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std
    if row_scale:
        weight *= 2.0 ** (torch.arange(shape[0]) % row_scale)[:, None]
    if zero_row is not None:
        weight[zero_row] = 0
    if outlier:
        weight.view(-1)[3] = outlier
    return weight.to(DTYPES[dtype])


def common(case):
    return {"method": case["method"], "target": case["device"], "fp8_config": case["fp8"], "hp_dtype": case["hp_dtype"]}


def activation_verdicts():
    for vector in vectors("activation_scale"):
        case, expected = vector["input"], vector["expected"]
        if math.isfinite(expected) and expected > 0:
            ours = activation_scale(case["maxabs"], **common(case)).item()
            yield case["method"], verdict(ours, expected, case["maxabs"], case, backoff=0.25)


def linear_verdicts():
    for vector in vectors("linear_scales"):
        case, expected = vector["input"], vector["expected"]
        if case["cast"] != "saturate":
            continue
        scale = activation_scale(case["input_maxabs"], **common(case)).item()
        inputs = verdict(scale, expected["inputs"][0], case["input_maxabs"], case, backoff=0.25)
        weight = weight_of(**case["weight"])
        scale, by_inc = weight_scale(weight, **common(case)), expected["weight"]
        by_inc = by_inc["0"] if isinstance(by_inc, dict) else by_inc  # "1" scales the input channels, always by one
        shape = (weight.shape[0], 1) if "_pcs_" in case["method"] else (1,)
        assert scale.shape == shape, case
        by_inc = by_inc if isinstance(by_inc, list) else [by_inc]
        yield (
            case["method"],
            inputs,
            verdict(scale.flatten().tolist(), by_inc, expected["weight_maxabs"], case, backoff=0.5),
        )


def test_activation_scales_are_those_of_inc():
    found = Counter(verdict for _, verdict in activation_verdicts())
    assert found == {"equal": 234, "reciprocal": 19}
    assert found.total() == 253


def test_linear_scales_are_those_of_inc():
    _, inputs, weights = zip(*linear_verdicts(), strict=True)
    assert len(inputs) == len(weights) == 84
    assert Counter(inputs) == {"equal": 78, "reciprocal": 6}
    assert Counter(weights) == {"equal": 81, "reciprocal": 3}


def test_all_vectors_are_compared():
    assert len([*activation_verdicts(), *linear_verdicts()]) == 253 + 84 == 337


def test_vectors_cover_every_static_method():
    static = {name for name in INC_METHODS if not SCALE_METHODS[name].dynamic_only}
    assert {method for method, _ in activation_verdicts()} == static
    assert {method for method, *_ in linear_verdicts()} == static


def test_full_scales():
    cases = [(v["input"], v["expected"]) for v in vectors("fullscale")]
    assert len(cases) == 4
    for case, expected in cases:
        assert number_format(case["fp8"], case["device"]).full_scale == expected


def test_hardware_scales():
    # INC lists scales for E5M2 too, but its own rounding always takes those of E4M3.
    cases = [(v["input"], v["expected"]) for v in vectors("hw_scales") if v["input"]["fp8"] == "E4M3"]
    assert len(cases) == 2
    for case, expected in cases:
        assert number_format("E4M3", case["device"]).hardware_scales.descending() == expected
        assert number_format("E5M2", case["device"]).hardware_scales.descending() == expected


@pytest.mark.parametrize("kind, rounding, count", [("round_pow2", "pow2", 42), ("round_hw", "hardware", 17)])
def test_rounding(kind, rounding, count):
    cases = [(v["input"], v["expected"]) for v in vectors(kind)]
    assert len(cases) == count
    for case, expected in cases:
        raw = torch.tensor([case["scale"]], dtype=DTYPES[case["dtype"]])
        fmt = number_format("E4M3", case.get("device", "cpu"))
        assert round_scale(raw, rounding, fmt).item() == expected, case


def test_dynamic_scales():
    x = (torch.randn(3, 8, generator=torch.Generator().manual_seed(7)) * 3).bfloat16()
    cases = [(v["input"], v["expected"]) for v in vectors("dynamic_scale")]
    found = Counter()
    for case, expected in cases:
        rule, fmt = scale_method(case["method"]).dynamic_activation, number_format("E4M3", case["device"])
        per_token = expected["class"] == "MaxAbsDynamicPcs"
        assert per_token == (rule.granularity == PerToken())
        rows = x.T if per_token and case["scale_dim_index"] == -2 else x
        scale = ops.dynamic_scale(
            rows,
            group=-1 if per_token else 0,
            divisor=rule.divisor(fmt),
            rounding=rule.rounding,
            fp8_config="E4M3",
            target=case["device"],
            hp_dtype=torch.bfloat16,
        )
        ours, by_inc = scale.flatten().tolist(), np.ravel(expected["scale"]).tolist()
        found[verdict(ours, by_inc, x.abs().max().item(), case | {"fp8": "E4M3"}, backoff=0.5)] += 1
    assert found == {"equal": 11, "reciprocal": 1}


@pytest.mark.parametrize("vector", vectors("cpu_quantize_codes"), ids=lambda v: f"{v['input']['fp8']}-{v['id']}")
def test_codes(vector):
    case, expected = vector["input"], vector["expected"]
    fmt, scale = number_format(case["fp8"], "cpu"), torch.tensor([case["scale"]])
    codes = ops.cast_to_fp8(torch.tensor(case["x_bf16"]).bfloat16(), scale, fmt.dtype, fmt.full_scale)
    assert codes.view(torch.uint8).tolist() == expected["codes_u8"]
    assert ops.cast_from_fp8(codes, scale, torch.bfloat16).tolist() == expected["dequant_bf16"]
