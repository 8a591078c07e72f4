"""Mistakes in `ops/hpu/conv.py`, and the tests that fail with them."""

CONV = "tests/ops/hpu/test_conv.py::test_value"
CONV_INF = (
    "tests/ops/hpu/test_conv.py::test_what_the_operator_does_not_take_is_refused[change5-reads those above 240 as Inf]"
)
CONV_NUMBERS = "tests/ops/hpu/test_conv.py::test_known_constants_are_passed_as_numbers"
FOLDED = "tests/ops/hpu/test_conv.py::test_scales_of_channels_are_folded_out"
GEOMETRY_0 = "tests/ops/hpu/test_conv.py::test_geometry[geometry0-kernel0]"
GEOMETRY_2 = "tests/ops/hpu/test_conv.py::test_geometry[geometry2-kernel2]"
ONE_DIMENSION = "tests/ops/hpu/test_conv.py::test_one_dimension"

FAILS: dict[str, list[tuple[str, str]]] = {
    "    return refuses_full_scale(x, weight.dtype, call.full_scale)": [
        (CONV_INF, "    return None"),
    ],
    "codes = quantize(x, input_scale, call.weight.dtype, call.full_scale)": [
        (CONV_NUMBERS, "codes = quantize(x, input_scale.reciprocal(), call.weight.dtype, call.full_scale)"),
        (CONV_NUMBERS, "codes = quantize(x, call.weight_scale.flatten()[:1], call.weight.dtype, call.full_scale)"),
        (CONV, "codes = quantize(x, input_scale, torch.float8_e4m3fn, call.full_scale)"),
    ],
    'call.weight_scale.numel() == 1 and call.arithmetic == "gaudi"': [
        (CONV_NUMBERS, "False"),
        (FOLDED, 'call.arithmetic == "gaudi"'),
        (CONV, "call.weight_scale.numel() == 1"),
    ],
    "_product(call, codes, input_scale, call.weight_scale, dtype), bias": [
        (CONV_NUMBERS, "_product(call, codes, call.weight_scale, input_scale, dtype), bias"),
        (ONE_DIMENSION, "_product(call, codes, input_scale, call.weight_scale, dtype), None"),
        (CONV, "_product(call, codes, input_scale, call.weight_scale, torch.float32), bias"),
    ],
    "input_scale * reference.along_channels(call, call.weight_scale)": [
        (ONE_DIMENSION, "reference.along_channels(call, call.weight_scale)"),
        (ONE_DIMENSION, "input_scale"),
        (ONE_DIMENSION, "input_scale / reference.along_channels(call, call.weight_scale)"),
        (FOLDED, "input_scale * call.weight_scale"),
    ],
    "_product(call, codes, None, None, torch.float32) * scale": [
        (ONE_DIMENSION, "_product(call, codes, None, None, torch.float32)"),
        (ONE_DIMENSION, "_product(call, codes, None, None, torch.float32) / scale"),
        (FOLDED, "_product(call, codes, None, None, dtype) * scale"),
        (FOLDED, "_product(call, codes, input_scale, call.weight_scale, torch.float32)"),
    ],
    "reference.with_bias(product, bias, dtype, call.arithmetic)": [
        (ONE_DIMENSION, "reference.with_bias(product, None, dtype, call.arithmetic)"),
        (ONE_DIMENSION, 'reference.with_bias(product, bias, dtype, "fused")'),
        (ONE_DIMENSION, "reference.with_bias(product, bias, torch.float32, call.arithmetic)"),
        (CONV, 'reference.with_bias(product, bias, dtype, "gaudi")'),
    ],
    "codes if ndim == weight.ndim else codes.unsqueeze(0)": [
        (ONE_DIMENSION, "codes"),
    ],
    "image, weight = image.unsqueeze(2), weight.unsqueeze(2)": [
        (ONE_DIMENSION, "image, weight = image.unsqueeze(3), weight.unsqueeze(3)"),
    ],
    "[value] * missing + list(sizes)": [
        (ONE_DIMENSION, "list(sizes) + [value] * missing"),
    ],
    "((1, call.stride), (0, call.padding), (1, call.dilation))": [
        (ONE_DIMENSION, "((2, call.stride), (0, call.padding), (1, call.dilation))"),
        (ONE_DIMENSION, "((1, call.stride), (1, call.padding), (1, call.dilation))"),
        (ONE_DIMENSION, "((1, call.stride), (0, call.padding), (2, call.dilation))"),
    ],
    '{"input": image, "weight": weight, "bias": None,': [
        (CONV_NUMBERS, '{"input": weight, "weight": image, "bias": None,'),
    ],
    '"bias": None,': [
        (ONE_DIMENSION, '"bias": call.bias,'),
    ],
    '"stride": stride, "padding": padding}': [
        (CONV_NUMBERS, '"stride": padding, "padding": stride}'),
        (CONV_NUMBERS, '"stride": stride, "padding": dilation}'),
        (ONE_DIMENSION, '"stride": stride[::-1], "padding": padding}'),
        (ONE_DIMENSION, '"stride": stride, "padding": padding[::-1]}'),
        (GEOMETRY_0, '"stride": dilation, "padding": padding}'),
    ],
    '{"dilation": dilation, "groups": call.groups, "out_dtype": dtype}': [
        (ONE_DIMENSION, '{"dilation": dilation[::-1], "groups": call.groups, "out_dtype": dtype}'),
        (GEOMETRY_0, '{"dilation": stride, "groups": call.groups, "out_dtype": dtype}'),
        (GEOMETRY_2, '{"dilation": dilation, "groups": 1, "out_dtype": dtype}'),
        (FOLDED, '{"dilation": dilation, "groups": call.groups, "out_dtype": torch.bfloat16}'),
        (CONV, '{"dilation": dilation, "groups": call.groups, "out_dtype": torch.float32}'),
    ],
    "constant_of(input_scale), constant_of(weight_scale)": [
        (CONV_NUMBERS, "constant_of(weight_scale), constant_of(input_scale)"),
    ],
    'operator("conv2d_fp8", "scalar")(**arguments, scale_input=1.0, scale_weight=1.0)': [
        (FOLDED, 'operator("conv2d_fp8")(**arguments, scale_input=torch.ones(1), scale_weight=torch.ones(1))'),
        (CONV, 'operator("conv2d_fp8")(**arguments)'),
    ],
    "scale_input=1.0, scale_weight=1.0": [
        (FOLDED, "scale_input=2.0, scale_weight=1.0"),
        (FOLDED, "scale_input=1.0, scale_weight=2.0"),
    ],
    "s_x is not None and s_w is not None": [
        (CONV_NUMBERS, "False"),
    ],
    'operator("conv2d_fp8", "scalar")(**arguments, scale_input=s_x, scale_weight=s_w)': [
        (CONV_NUMBERS, 'operator("conv2d_fp8")(**arguments, scale_input=input_scale, scale_weight=weight_scale)'),
    ],
    "scale_input=s_x, scale_weight=s_w": [
        (CONV_NUMBERS, "scale_input=s_w, scale_weight=s_x"),
        (CONV_NUMBERS, "scale_input=1.0 / s_x, scale_weight=s_w"),
        (CONV_NUMBERS, "scale_input=s_x, scale_weight=1.0 / s_w"),
    ],
    'operator("conv2d_fp8")(': [
        (CONV, 'operator("conv2d_fp8", "scalar")('),
    ],
    "scale_input=input_scale, scale_weight=weight_scale": [
        (ONE_DIMENSION, "scale_input=input_scale.reciprocal(), scale_weight=weight_scale"),
        (ONE_DIMENSION, "scale_input=input_scale, scale_weight=weight_scale.reciprocal()"),
        (CONV, "scale_input=weight_scale, scale_weight=input_scale"),
    ],
    "out = out.squeeze(2) if missing else out": [
        (ONE_DIMENSION, "pass"),
    ],
    "out if ndim == call.weight.ndim else out.squeeze(0)": [
        (ONE_DIMENSION, "out"),
    ],
}
