"""`ops.experts` token by token in float64, and the overloads of Gaudi's operator with the same codes and scales."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from expert_operands import EXPERTS, HIDDEN, INNER, TOKENS, TOP, WEIGHT_SCALES, Data, ulps_apart, wide
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8OperandError, FP8ScaleError
from optimum_fp8.ops.reference_experts import halves_of
from optimum_fp8.test_utils import gaudi

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
HIGH = {BF16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
FP8 = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


def codes_of(values, scale, data):
    """Values rounded to FP8 with a scale, as what they stand for; float64."""
    scaled = values.astype(np.float32) * (np.float32(1) / np.float32(scale))
    return scaled.clip(-data.full_scale, data.full_scale).astype(FP8[data.fp8]).astype(np.float64) * float(scale)


def by_hand(data, activation="silu", experts_min=0, between=lambda value: value):
    """Token by token in float64, which rounds nothing but to FP8, and what `between` rounds."""
    total = np.zeros((TOKENS, HIDDEN))
    rows = 2 * INNER // data.gate_up_scale.shape[1]
    weights = wide(data.gate_up) * wide(data.gate_up_scale.repeat_interleave(rows, 1))
    down = wide(data.down) * wide(data.down_scale)
    for token, x in enumerate(wide(data.x)):
        if data.input_scale is not None:
            x = codes_of(x, data.input_scale.expand(TOKENS, 1)[token].item(), data)
        for expert, router in sorted(zip(data.table[token].tolist(), wide(data.router)[token], strict=True)):
            if not 0 <= (expert := expert - experts_min) < data.experts:
                continue
            both = between(weights[expert] @ x)
            gate, up = both[:INNER], both[INNER:]
            act = between(ACTIVATIONS[activation](torch.from_numpy(gate)).numpy())
            middle = between(act * up)
            if data.intermediate_scale is not None:
                middle = codes_of(middle, data.intermediate_scale[expert].item(), data)
            elif data.input_scale is not None:
                middle = codes_of(middle, np.float32(np.abs(middle).max() + 1e-8) / data.full_scale, data)
            total[token] = between(total[token] + between(between(down[expert] @ middle) * router))
    return total


def relative_error(found, exact):
    return np.linalg.norm(wide(found) - exact) / np.linalg.norm(exact)


@pytest.mark.core
@over(dtype=list(HIGH), arithmetic=ops.ARITHMETICS, scales=list(WEIGHT_SCALES), activations=["static", "dynamic", None])
def test_value(dtype, arithmetic, scales, activations):
    data = Data(dtype, scales=scales, activations=activations)
    found = data.run(arithmetic=arithmetic)
    assert found.dtype == dtype and found.shape == (TOKENS, HIDDEN)
    exact = by_hand(data)
    # An intermediate that is rounded in between may fall to the next code: a sixteenth of its value.
    bound = {"fused": 4 * torch.finfo(dtype).eps}.get(arithmetic, 0.04) + (1e-3 if activations else 0)
    assert relative_error(found, exact) < bound


@over(activation=list(ACTIVATIONS), fp8=[E4M3, E5M2])
def test_activations(activation, fp8):
    data = Data(torch.float32, fp8=fp8)
    assert relative_error(data.run(activation=activation), by_hand(data, activation)) < 1e-3


@over(arithmetic=["fused", "gaudi"])
def test_where_it_rounds(arithmetic):
    """On small integers sums of products are exact, so that only the stated roundings are left."""
    data = Data(scales="one an expert", activations=None)
    data.x = torch.randint(-8, 9, (TOKENS, HIDDEN)).to(BF16)
    data.gate_up, data.down = (torch.randint(-8, 9, each.shape).to(E4M3) for each in (data.gate_up, data.down))
    data.gate_up_scale.fill_(0.125)
    data.down_scale.fill_(0.5)

    def to_bf16(value):
        return value.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)

    exact = to_bf16(by_hand(data, "relu", between=to_bf16 if arithmetic == "gaudi" else lambda value: value))
    other = to_bf16(by_hand(data, "relu", between=to_bf16 if arithmetic == "fused" else lambda value: value))
    assert np.array_equal(wide(data.run(activation="relu", arithmetic=arithmetic)), exact)
    assert not np.array_equal(exact, other)


@over(arithmetic=ops.ARITHMETICS)
def test_experts_of_other_processes_contribute_nothing(arithmetic):
    whole = Data(torch.float32)
    found = torch.zeros(TOKENS, HIDDEN)
    for low in (0, 2):
        part = dataclasses.replace(whole)
        part.x, part.table, part.router, part.input_scale = whole.x, whole.table, whole.router, whole.input_scale
        for name in ("gate_up", "down", "gate_up_scale", "down_scale", "intermediate_scale"):
            setattr(part, name, getattr(whole, name)[low : low + 2])
        mine = part.run(experts_min=low, arithmetic=arithmetic)
        assert not torch.equal(mine, whole.run(arithmetic=arithmetic))
        outside = ((whole.table < low) | (whole.table >= low + 2)).all(dim=1)
        assert not mine[outside].any()
        found += mine
    torch.testing.assert_close(found, whole.run(arithmetic=arithmetic), rtol=0.02, atol=0.02)
    assert not whole.run(experts_min=100).any()


def test_an_expert_that_occurs_twice_has_the_sum_of_its_weights():
    data = Data(torch.float32)
    data.table[:, 1] = data.table[:, 0]
    expected = dataclasses.replace(data)
    for name in ("x", "gate_up", "down", "gate_up_scale", "down_scale", "input_scale", "intermediate_scale"):
        setattr(expected, name, getattr(data, name))
    expected.table, expected.router = data.table[:, :1], data.router.sum(1, keepdim=True)
    torch.testing.assert_close(data.run(), expected.run())


def test_no_token_and_what_is_not_finite():
    data = Data()
    data.x, data.table, data.router = data.x[:0], data.table[:0], data.router[:0]
    assert data.run().shape == (0, HIDDEN)
    data = Data()
    data.x[0] = torch.nan  # of one token
    found = data.run()
    assert found[0].isnan().all() and found[1:].isfinite().all()


@over(index=[torch.int32, torch.int64, torch.uint8])
def test_tables_of_any_integer(index):
    data = Data()
    expected = data.run()
    data.table = data.table.to(index)
    assert torch.equal(data.run(), expected)


def broken(**changes):
    data = Data()
    for name, value in changes.items():
        setattr(data, name, value)
    return data


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"gate_up": torch.zeros(EXPERTS, 2 * INNER, HIDDEN)}, FP8OperandError, "one FP8 format"),
        ({"x": torch.zeros(TOKENS, HIDDEN).to(E4M3)}, FP8OperandError, "high precision"),
        ({"x": torch.zeros(TOKENS, HIDDEN + 1)}, FP8OperandError, r"expected \[tokens, hidden\]"),
        ({"down": torch.zeros(EXPERTS, INNER, HIDDEN).to(E4M3)}, FP8OperandError, r"\[experts, hidden, inner\]"),
        ({"table": torch.zeros(TOKENS, TOP)}, FP8OperandError, "expected integers"),
        ({"router": torch.zeros(TOKENS, TOP + 1)}, FP8OperandError, "experts of each token"),
        ({"gate_up_scale": torch.ones(EXPERTS)}, FP8ScaleError, "gate_up_scale of shape"),
        ({"down_scale": torch.ones(EXPERTS, INNER, 1)}, FP8ScaleError, "down_scale of shape"),
        ({"intermediate_scale": torch.ones(1)}, FP8ScaleError, "intermediate_scale of shape"),
        ({"input_scale": torch.ones(TOKENS)}, FP8ScaleError, "input_scale of shape"),
        ({"input_scale": None}, FP8ScaleError, "without an input_scale"),
    ],
)
def test_refuses_what_does_not_fit(changes, error, text):
    with pytest.raises(error, match=text):
        broken(**changes).run()


def test_refuses_unknown_words():
    with pytest.raises(FP8ConfigError, match="silu"):
        Data().run(activation="silou")
    with pytest.raises(FP8ConfigError, match="arithmetic='gaudi2' is unknown"):
        Data().run(arithmetic="gaudi2")


def test_counts_its_calls():
    record = ops.CallRecord()
    data = Data()
    data.run(record=record)
    record.watch(data.gate_up)
    torch.compile(data.run, backend="eager")(arithmetic="gaudi")
    assert sum(record.kernels.values()) == 2 and {op for op, _ in record.kernels} == {"experts"}


# --- Gaudi's operator -------------------------------------------------------------------------------------------------

CHIPS = {"gaudi2": 240.0, "gaudi3": 448.0}


def on_gaudi(data, fused, scalars, full_scale):
    """One call of Gaudi's operator, written out: w1 is the gate, w2 the up and w3 the down projection."""
    number = (lambda scale: scale.item()) if scalars else (lambda scale: scale.reshape(-1))
    gates_ups = [data.gate_up[i].chunk(2) for i in range(data.experts)]
    halves = [halves_of(scale) for scale in data.gate_up_scale]
    if fused:
        weights, scales = [list(data.gate_up)], [[number(scale) for scale in data.gate_up_scale]]
    else:
        weights = [[each[side] for each in gates_ups] for side in (0, 1)]
        scales = [[number(each[side]) for each in halves] for side in (0, 1)]
    weights, scales = [*weights, list(data.down)], [*scales, [number(scale) for scale in data.down_scale]]
    codes = ops.cast_to_fp8(data.x, data.input_scale, data.fp8, full_scale)
    activations = [number(data.input_scale) if data.activations == "static" else data.input_scale]
    if data.activations == "static":
        activations.append([number(scale) for scale in data.intermediate_scale])
    rest = (True, "silu", 0, data.experts - 1)
    given = (codes, data.table, data.router.to(BF16), *weights, *activations, *scales, *rest)
    return torch.ops.hpu.mixture_of_experts(*given)


@pytest.mark.core
@pytest.mark.parametrize("chip, full_scale", CHIPS.items())
@over(
    scales=list(WEIGHT_SCALES),
    fused=[False, True],
    scalars=[False, True],
    activations=["static", "dynamic"],
    dtype=[BF16, torch.float32],
)
def test_is_what_gaudi_computes(chip, full_scale, scales, fused, scalars, activations, dtype):
    halves_fused = fused and scales == "halves"  # fused weights have one scale, or one a channel
    if halves_fused or (scalars and (scales == "channels" or activations == "dynamic")):
        return
    data = Data(dtype, scales=scales, activations=activations, full_scale=full_scale)
    with gaudi.emulated(chip) as device:
        expected = on_gaudi(data, fused, scalars, full_scale)
    named = ["fp8", *["fused_weights"] * fused, *["scalars"] * scalars, *["dynamic"] * (activations == "dynamic")]
    assert device.calls[-1].overload == "_".join(named)
    found = data.run(arithmetic="gaudi")
    assert found.dtype == dtype and ulps_apart(found.to(BF16), expected) <= 1
