"""Experts on an emulated Gaudi are those of the reference, through the overload that weights and scales ask for."""

from __future__ import annotations

import pytest
import torch
from expert_operands import EXPERTS, INNER, TOKENS, TOP, WEIGHT_SCALES, Data, ulps_apart
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError, FP8OperandError
from optimum_fp8.formats import number_format
from optimum_fp8.ops.hpu import experts as hpu_experts
from optimum_fp8.test_utils import gaudi

CHIPS = ("gaudi2", "gaudi3")
SCALES = ("gate_up_scale", "down_scale", "input_scale", "intermediate_scale")


def data_for(chip, **options):
    return Data(full_scale=number_format("E4M3", chip).full_scale, **options)


def marked(data, chip):
    """The same, with scales in the hardware's set that are known to be constants."""
    hardware = number_format("E4M3", chip).hardware_scales
    for name in SCALES:
        scale = getattr(data, name)
        scale.copy_(2.0 ** (torch.log2(scale) / 4).round().mul(4).clamp(-8, 4))
        assert ops.mark_constants(scale, hardware)
    return data


def assert_as_reference(data, chip, **options):
    """Run both ways; the calls that were made of Gaudi's operators."""
    expected = data.run(arithmetic="gaudi", **options)
    with gaudi.emulated(chip) as device, ops.backend("hpu"):
        found = data.run(arithmetic="gaudi", **options)
    assert found.dtype == expected.dtype == data.dtype
    assert ulps_apart(found.bfloat16(), expected.bfloat16()) <= 1
    assert [call.name for call in device.calls[:1]] == ["cast_to_fp8_v2"]
    assert {call.name for call in device.calls[1:]} == {"mixture_of_experts"}
    return device.calls[1:]


@pytest.mark.core
@pytest.mark.parametrize("chip", CHIPS)
@over(
    scales=list(WEIGHT_SCALES),
    activations=["static", "dynamic"],
    dtype=[torch.bfloat16, torch.float32],
    fp8=[torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_value(chip, scales, activations, dtype, fp8):
    data = data_for(chip, scales=scales, activations=activations, dtype=dtype, fp8=fp8)
    if fp8 is torch.float8_e5m2:
        data.full_scale = 57344.0
    (call,) = assert_as_reference(data, chip)
    words = ["fp8", *["fused_weights"] * (scales != "halves"), *["dynamic"] * (activations == "dynamic")]
    assert call.overload == "_".join(words)


@pytest.mark.core
@pytest.mark.parametrize("chip", CHIPS)
@over(scales=["halves", "one an expert"])
def test_known_constants_are_passed_as_numbers(chip, scales):
    data = marked(data_for(chip, scales=scales), chip)
    (call,) = assert_as_reference(data, chip)
    assert call.overload == ("fp8_scalars" if scales == "halves" else "fp8_fused_weights_scalars")
    assert call.free_scales
    data.down_scale.mul_(2)  # no longer what it was
    (call,) = assert_as_reference(data, chip)
    assert call.overload == ("fp8" if scales == "halves" else "fp8_fused_weights")


def test_one_scale_that_is_no_constant_makes_all_tensors():
    for name in SCALES:
        data = marked(data_for("gaudi2"), "gaudi2")
        setattr(data, name, getattr(data, name).clone())
        (call,) = assert_as_reference(data, "gaudi2")
        assert call.overload == "fp8", name


def test_scales_by_channel_are_no_numbers():
    data = marked(data_for("gaudi2", scales="channels"), "gaudi2")
    one_an_expert = marked(data_for("gaudi2", scales="one an expert"), "gaudi2").down_scale
    for down_scale in (data.down_scale, one_an_expert):
        data.down_scale = down_scale
        (call,) = assert_as_reference(data, "gaudi2")
        assert call.overload == "fp8_fused_weights"


@over(scales=["halves", "one an expert"], activation=["silu", "gelu", "relu"], constants=[False, True])
def test_what_each_argument_is(monkeypatch, scales, activation, constants):
    """w1 is the gate, w2 the up and w3 the down projection; nothing is copied, and no scale is inverted."""
    data, given = data_for("gaudi2", scales=scales), {}
    data = marked(data, "gaudi2") if constants else data
    data.table, data.router = data.table.to(torch.int32), data.router.float()

    def noting(name, overload):
        return lambda **arguments: given.update(arguments) or operator(name, overload)(**arguments)

    operator = hpu_experts.operator
    with monkeypatch.context() as patch:
        patch.setattr(hpu_experts, "operator", noting)
        assert_as_reference(data, "gaudi2", activation=activation, experts_min=1)
    assert given["expert_routing_table"].dtype == torch.int64 and given["router_weights"].dtype == torch.bfloat16
    assert given["permuted_weights"] is True and given["activation"] == activation
    assert (given["experts_min"], given["experts_max"]) == (1, EXPERTS)
    found = {name: scales for name, scales in given.items() if name.startswith("d_scale")}
    found["d_scale_hidden_states"] = [found["d_scale_hidden_states"]]
    each = [scale for scales in found.values() for scale in scales]
    assert all(isinstance(scale, float) if constants else scale.shape == (1,) for scale in each)
    found = {name: [float(scale) for scale in scales] for name, scales in found.items()}
    assert found["d_scale_hidden_states"] == data.input_scale.tolist()
    assert found["d_scale_intermediate_hidden_states"] == data.intermediate_scale.flatten().tolist()
    for i in range(EXPERTS):
        expected = {"w3": (data.down[i], data.down_scale[i])}
        if scales == "halves":
            gate_up, scale = data.gate_up[i], data.gate_up_scale[i]
            expected |= {"w1": (gate_up[:INNER], scale[0]), "w2": (gate_up[INNER:], scale[1])}
        else:
            expected["w12"] = data.gate_up[i], data.gate_up_scale[i]
        for name, (weight, scale) in expected.items():
            matrix = given[name][i]
            assert matrix.data_ptr() == weight.data_ptr() and matrix.shape == weight.shape
            assert found[f"d_scale_{name}"][i] == scale.item()


@pytest.mark.parametrize("chip", CHIPS)
@over(count=[64, 65, 150], constants=[False, True], scales=["halves", "channels"])
def test_more_experts_than_the_operator_takes(chip, count, constants, scales):
    data = data_for(chip, experts=count, scales=scales)
    data.table = torch.randint(0, count, (TOKENS, TOP + 3))
    data.router = torch.rand(TOKENS, TOP + 3).bfloat16()
    if constants:
        marked(data, chip)
    calls = assert_as_reference(data, chip, experts_min=0)
    ranges = [(call.arguments["experts_min"], call.arguments["experts_max"]) for call in calls]
    assert ranges == [(start, min(start + 64, count) - 1) for start in range(0, count, 64)]
    numbers = constants and scales == "halves"
    assert all(call.overload.endswith("scalars") is numbers for call in calls)
    assert [len(call.arguments["w3"]) for call in calls] == [high - low + 1 for low, high in ranges]


def test_an_older_bridge_lacks_the_operator():
    data = data_for("gaudi2")
    with gaudi.emulated("gaudi2", bridge="1.19"), ops.backend("hpu"):
        message = (
            r"torch.ops.hpu.mixture_of_experts.fp8 is not in this bridge \(of mixture_of_experts there are default"
        )
        with pytest.raises(FP8NotAvailableError, match=message):
            data.run(arithmetic="gaudi")


@pytest.mark.parametrize(
    "options, arithmetic, text",
    [
        ({"activations": None}, "gaudi", "weight-only"),
        ({"dtype": torch.float16}, "gaudi", "torch.float16"),
        ({}, "fused", "it rounds between its products"),
    ],
)
def test_refuses_what_gaudi_does_not_compute(options, arithmetic, text):
    data = data_for("gaudi2", **options)
    with gaudi.emulated("gaudi2"), ops.backend("hpu"), pytest.raises(FP8NotAvailableError, match=text):
        data.run(arithmetic=arithmetic)


@pytest.mark.parametrize(
    "chip, full_scale, text",
    [("gaudi2", 448.0, "reads those above 240 as Inf"), ("gaudi3", 240.0, "saturate at 240 between their products")],
    ids=["above", "below"],
)
def test_refuses_to_saturate_elsewhere_than_the_card(chip, full_scale, text):
    data = data_for(chip)
    data.full_scale = full_scale
    with gaudi.emulated(chip), ops.backend("hpu"), pytest.raises(FP8NotAvailableError, match=text):
        data.run(arithmetic="gaudi")


def test_what_does_not_fit_is_an_error():
    data = data_for("gaudi2")
    data.down = data.down[:2]
    with gaudi.emulated("gaudi2"), ops.backend("hpu"), pytest.raises(FP8OperandError):
        data.run(arithmetic="gaudi")


def test_compilers_see_gaudis_operator():
    data, graphs = data_for("gaudi2"), []

    def look(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    with gaudi.emulated("gaudi2"), ops.backend("hpu"):
        expected = data.run(arithmetic="gaudi")
        found = torch.compile(lambda: data.run(arithmetic="gaudi"), backend=look, fullgraph=True)()
    assert torch.equal(found, expected)
    assert len(graphs) == 1 and "hpu.mixture_of_experts.fp8" in graphs[0]
