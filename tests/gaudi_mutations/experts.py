"""Mistakes in `ops/hpu/experts.py`, and the tests that fail with them."""

CHANNELS = "tests/ops/hpu/test_experts.py::test_scales_by_channel_are_no_numbers"
EXPERTS = "tests/ops/hpu/test_experts.py::test_value[gaudi2]"
EXPERTS_ABOVE = "tests/ops/hpu/test_experts.py::test_refuses_to_saturate_elsewhere_than_the_card[above]"
EXPERTS_BELOW = "tests/ops/hpu/test_experts.py::test_refuses_to_saturate_elsewhere_than_the_card[below]"
EXPERTS_GIVEN = "tests/ops/hpu/test_experts.py::test_what_each_argument_is"
EXPERTS_MISFIT = "tests/ops/hpu/test_experts.py::test_what_does_not_fit_is_an_error"
EXPERTS_NUMBERS = "tests/ops/hpu/test_experts.py::test_known_constants_are_passed_as_numbers[gaudi2]"
MANY_EXPERTS = "tests/ops/hpu/test_experts.py::test_more_experts_than_the_operator_takes[gaudi2]"
NO_CONSTANT = "tests/ops/hpu/test_experts.py::test_one_scale_that_is_no_constant_makes_all_tensors"

FAILS: dict[str, list[tuple[str, str]]] = {
    "if reason := refuses_full_scale(": [
        (EXPERTS_ABOVE, "if reason := None and refuses_full_scale("),
    ],
    "if call.full_scale < largest else None": [
        (EXPERTS_BELOW, "if False else None"),
    ],
    "    check_experts(call)\n": [
        (EXPERTS_MISFIT, ""),
    ],
    '"hidden_states": quantize(call.x, call.input_scale, ': [
        (EXPERTS_GIVEN, '"hidden_states": quantize(call.x, call.input_scale.reciprocal(), '),
    ],
    'call.gate_up.dtype, call.full_scale),\n        "expert': [
        (EXPERTS, 'torch.float8_e4m3fn, call.full_scale),\n        "expert'),
    ],
    '"expert_routing_table": call.table': [
        (EXPERTS_GIVEN, '"expert_routing_table": call.router_weights'),
    ],
    "call.table.to(torch.int64)": [
        (EXPERTS_GIVEN, "call.table.to(torch.int32)"),
        (EXPERTS_GIVEN, "call.table.to(torch.int64) + 1"),
    ],
    '"router_weights": call.router_weights': [
        (EXPERTS_GIVEN, '"router_weights": call.table'),
    ],
    "call.router_weights.to(torch.bfloat16)": [
        (EXPERTS_GIVEN, "call.router_weights"),
        (EXPERTS_GIVEN, "call.router_weights.to(torch.float32)"),
    ],
    '"_".join(part.words)': [
        (EXPERTS_GIVEN, '"fp8"'),
        (EXPERTS_NUMBERS, '"_".join(part.words).removesuffix("_scalars")'),
    ],
    "permuted_weights=True": [
        (EXPERTS_GIVEN, "permuted_weights=False"),
    ],
    "activation=call.activation": [
        (EXPERTS_GIVEN, 'activation="silu"'),
    ],
    "experts_min=call.experts_min + start": [
        (EXPERTS_GIVEN, "experts_min=start"),
        (MANY_EXPERTS, "experts_min=call.experts_min"),
    ],
    "experts_min=call.experts_min + start,\n            experts_max=call.experts_min + stop - 1,": [
        (EXPERTS_GIVEN, "experts_max=call.experts_min + start,\n            experts_min=call.experts_min + stop - 1,"),
    ],
    "experts_max=call.experts_min + stop - 1": [
        (EXPERTS_GIVEN, "experts_max=call.experts_min + stop"),
        (EXPERTS_GIVEN, "experts_max=stop - 1"),
        (MANY_EXPERTS, "experts_max=call.experts_min + count - 1"),
    ],
    "found if total is None else total + found": [
        (MANY_EXPERTS, "found"),
    ],
    "total.to(call.x.dtype)": [
        (EXPERTS, "total"),
    ],
    "call.gate_up_scale.shape[1] != 2\n": [
        (EXPERTS_GIVEN, "True\n"),
        (EXPERTS_GIVEN, "False\n"),
    ],
    "call.gate_up[start:stop].unbind(), call.down": [
        (MANY_EXPERTS, "call.gate_up.unbind(), call.down"),
    ],
    "call.down[start:stop].unbind()": [
        (MANY_EXPERTS, "call.down.unbind()"),
    ],
    '"gate_up": part_of(call.gate_up_scale, start, stop)': [
        (EXPERTS_GIVEN, '"gate_up": part_of(call.down_scale, start, stop)'),
        (EXPERTS_GIVEN, '"gate_up": part_of(call.gate_up_scale.reciprocal(), start, stop)'),
        (MANY_EXPERTS, '"gate_up": part_of(call.gate_up_scale, 0, stop - start)'),
    ],
    '"w3": part_of(call.down_scale, start, stop)': [
        (EXPERTS_GIVEN, '"w3": part_of(call.gate_up_scale, start, stop)'),
        (EXPERTS_GIVEN, '"w3": part_of(call.down_scale.reciprocal(), start, stop)'),
        (MANY_EXPERTS, '"w3": part_of(call.down_scale, 0, stop - start)'),
    ],
    "= part_of(call.intermediate_scale, start, stop)": [
        (EXPERTS_GIVEN, "= part_of(call.intermediate_scale.reciprocal(), start, stop)"),
        (MANY_EXPERTS, "= part_of(call.intermediate_scale, 0, stop - start)"),
        (MANY_EXPERTS, "= call.intermediate_scale"),
    ],
    "    numbers = _all_numbers(call, scales)": [
        (EXPERTS_NUMBERS, "    numbers = False"),
    ],
    '{"w3": list(down)}': [
        (EXPERTS_GIVEN, '{"w3": list(gate_up)}'),
        (EXPERTS_GIVEN, '{"w3": list(down)[::-1]}'),
    ],
    'weights["w12"], listed["w12"] = list(gate_up), listed["gate_up"]': [
        (EXPERTS_GIVEN, 'weights["w12"], listed["w12"] = list(gate_up)[::-1], listed["gate_up"]'),
        (EXPERTS_GIVEN, 'weights["w12"], listed["w12"] = list(gate_up), listed["gate_up"][::-1]'),
    ],
    "= list(gate_up), listed": [
        (EXPERTS_GIVEN, "= [torch.cat(each.chunk(2)[::-1]) for each in gate_up], listed"),
    ],
    '{"w1": list(gates), "w2": list(ups)}': [
        (EXPERTS_GIVEN, '{"w1": list(ups), "w2": list(gates)}'),
        (EXPERTS_GIVEN, '{"w1": [gate.clone() for gate in gates], "w2": list(ups)}'),
        (EXPERTS_GIVEN, '{"w1": list(gates), "w2": [up.clone() for up in ups]}'),
    ],
    'listed["w1"], listed["w2"] = _halves': [
        (EXPERTS_GIVEN, 'listed["w2"], listed["w1"] = _halves'),
    ],
    "hidden_scale = constant_of(call.input_scale) if numbers else call.input_scale": [
        (EXPERTS_GIVEN, "hidden_scale = constant_of(call.input_scale) if numbers else call.input_scale.reciprocal()"),
        (EXPERTS_GIVEN, "hidden_scale = call.input_scale"),
        (EXPERTS_NUMBERS, "hidden_scale = 1.0 / constant_of(call.input_scale) if numbers else call.input_scale"),
    ],
    "dynamic = call.intermediate_scale is None": [
        (EXPERTS_GIVEN, "dynamic = True"),
        (EXPERTS, "dynamic = False"),
    ],
    '*["fused_weights"] * fused, ': [
        (EXPERTS_GIVEN, ""),
    ],
    '*["scalars"] * numbers, ': [
        (EXPERTS_NUMBERS, ""),
    ],
    '"d_scale_hidden_states": hidden_scale}': [
        (EXPERTS_GIVEN, '"d_scale_hidden_states": call.input_scale}'),
        (EXPERTS_GIVEN, '"d_scale_hidden_states": 1.0 / hidden_scale}'),
    ],
    '{"gate_up": 2 if call.gate_up_scale.shape[1] == 2 else 1}': [
        (EXPERTS_NUMBERS, '{"gate_up": 1}'),
        (CHANNELS, '{"gate_up": call.gate_up_scale.shape[1]}'),
    ],
    "return one_each and None": [
        (CHANNELS, "return None"),
    ],
    "(constant_of(call.input_scale), *map(constants_of, scales.values()))": [
        (EXPERTS_NUMBERS, "(constant_of(call.input_scale),)"),
        (NO_CONSTANT, "(*map(constants_of, scales.values()),)"),
    ],
    "        return list(constants_of(scales) or ())\n    return [scale.reshape(-1)": [
        (
            EXPERTS_NUMBERS,
            "        return [1.0 / scale for scale in constants_of(scales)]\n    return [scale.reshape(-1)",
        ),
    ],
    "return [scale.reshape(-1) for scale in scales.unbind()]": [
        (EXPERTS_GIVEN, "return [scale.reciprocal().reshape(-1) for scale in scales.unbind()]"),
        (EXPERTS_GIVEN, "return [scale for scale in scales.unbind()]"),
    ],
    "return values[::2], values[1::2]": [
        (EXPERTS_NUMBERS, "return values[1::2], values[::2]"),
        (EXPERTS_NUMBERS, "return values[: len(values) // 2], values[len(values) // 2 :]"),
        (EXPERTS_NUMBERS, "return [1.0 / value for value in values[::2]], values[1::2]"),
        (EXPERTS_NUMBERS, "return values[::2], [1.0 / value for value in values[1::2]]"),
    ],
    "[gate.reshape(-1) for gate, _ in pairs], [up.reshape(-1) for _, up in pairs]": [
        (EXPERTS_GIVEN, "[up.reshape(-1) for _, up in pairs], [gate.reshape(-1) for gate, _ in pairs]"),
        (EXPERTS_GIVEN, "[gate.reciprocal().reshape(-1) for gate, _ in pairs], [up.reshape(-1) for _, up in pairs]"),
        (EXPERTS_GIVEN, "[gate.reshape(-1) for gate, _ in pairs], [up.reciprocal().reshape(-1) for _, up in pairs]"),
    ],
}
