"""Mistakes in `ops/hpu/linear.py`, and the tests that fail with them."""

BLOCKS = "tests/ops/hpu/test_linear.py::test_scales_by_blocks[gaudi2]"
FORMATS = "tests/ops/hpu/test_linear.py::test_formats[gaudi2]"
FUSED = "tests/ops/hpu/test_linear.py::test_fused_arithmetic_adds_the_bias_before_it_rounds"
LINEAR_INF = "tests/ops/hpu/test_linear.py::test_codes_that_the_card_reads_as_inf_are_an_error_and_no_fallback"
NO_BLOCKS = "tests/ops/hpu/test_linear.py::test_an_older_bridge_takes_no_blocks"
NUMBERS = "tests/ops/hpu/test_linear.py::test_numbers_are_given_only_for_both_scales"
ON_GAUDI3 = "tests/ops/hpu/test_linear.py::test_codes_made_for_gaudi2_on_a_gaudi3"
OTHER_BLOCKS = "tests/ops/hpu/test_linear.py::test_scales_that_the_product_does_not_take_are_refused"
ROUNDS = "tests/ops/hpu/test_linear.py::test_rounds_where_the_arithmetic_says[gaudi2]"
STATIC = "tests/ops/hpu/test_linear.py::test_a_static_layer_is_a_cast_and_a_product_without_bias"
UNPACKED = "tests/ops/hpu/test_linear.py::test_a_weight_that_was_not_packed_is_read_transposed"
WEIGHT_ONLY = "tests/ops/hpu/test_linear.py::test_weight_only_is_a_high_precision_product"

FAILS: dict[str, list[tuple[str, str]]] = {
    "refuses_full_scale(x, weight.dtype, call.full_scale) or _refuses_blocks(call, scale)": [
        (NO_BLOCKS, "refuses_full_scale(x, weight.dtype, call.full_scale)"),
        (LINEAR_INF, "_refuses_blocks(call, scale)"),
    ],
    'if call.arithmetic == "qdq" or not group:': [
        (OTHER_BLOCKS, "if not group:"),
    ],
    "    if not takes_blocks():\n": [
        (NO_BLOCKS, "    if False:\n"),
    ],
    "call.weight_scale.numel() == 1 or block_of(call.weight_scale, call.weight) == group": [
        (BLOCKS, "block_of(call.weight_scale, call.weight) == group"),
    ],
    "    if not fits or any(size % group for size in call.weight.shape):": [
        (OTHER_BLOCKS, "    if not fits:"),
        (OTHER_BLOCKS, "    if any(size % group for size in call.weight.shape):"),
    ],
    "group_of(input_scale, call.x) or (BLOCK": [
        (BLOCKS, "0 or (BLOCK"),
    ],
    "(BLOCK if is_along_input(call.weight_scale, call.weight) else 0)": [
        (BLOCKS, "0"),
    ],
    '    if call.arithmetic == "qdq":\n        return _qdq(call)\n': [
        (BLOCKS, ""),
    ],
    'dtype not in WIDE or (call.arithmetic == "fused" and call.bias is not None)': [
        (ROUNDS, 'call.arithmetic == "fused" and call.bias is not None'),
        (FUSED, "dtype not in WIDE"),
        (FUSED, 'dtype not in WIDE or call.arithmetic == "fused"'),
        (FUSED, "dtype not in WIDE or call.bias is not None"),
    ],
    "dtype = torch.float32  # not": [
        (FUSED, "dtype = torch.bfloat16  # not"),
    ],
    "    return with_bias(product, call.bias, call.x.dtype, call.arithmetic)": [
        (NUMBERS, "    return with_bias(product, None, call.x.dtype, call.arithmetic)"),
        (ROUNDS, "    return with_bias(product, call.bias, dtype, call.arithmetic)"),
        (ROUNDS, '    return with_bias(product, call.bias, call.x.dtype, "gaudi")'),
        (ROUNDS, '    return with_bias(product, call.bias, call.x.dtype, "fused")'),
    ],
    "scale, call.weight.dtype, call.full_scale), scale, dtype)": [
        (FORMATS, "scale, call.weight.dtype, call.full_scale), scale.reciprocal(), dtype)"),
        (FORMATS, "scale.reciprocal(), call.weight.dtype, call.full_scale), scale, dtype)"),
        (FORMATS, "scale, call.weight.dtype, call.full_scale), scale, torch.float32)"),
    ],
    "    weight = dequantize(call.weight, call.weight_scale, dtype)": [
        (FORMATS, "    weight = dequantize(call.weight, call.weight_scale.reciprocal(), dtype)"),
        (FORMATS, "    weight = dequantize(call.weight, None, dtype)"),
    ],
    "F.linear(x, weight, None if call.bias is None else call.bias.to(dtype))": [
        (FORMATS, "F.linear(x, weight)"),
    ],
    "    if dtype == torch.bfloat16 and constant_of(scale) is not None:": [
        (ROUNDS, "    if constant_of(scale) is not None:"),
        (WEIGHT_ONLY, "    if dtype == torch.bfloat16:"),
        (WEIGHT_ONLY, "    if False:"),
    ],
    "F.linear(call.x, dequantize(weight, scale, dtype))": [
        (ROUNDS, "F.linear(call.x, dequantize(weight, scale.reciprocal(), dtype))"),
    ],
    "    if is_along_input(scale, weight):\n        return F": [
        (BLOCKS, "    if False:\n        return F"),
    ],
    "F.linear(call.x.float(), dequantize(weight, scale, torch.float32))": [
        (BLOCKS, "F.linear(call.x.float(), dequantize(weight, scale.reciprocal(), torch.float32))"),
        (BLOCKS, "F.linear(call.x.float(), dequantize(weight, scale, torch.bfloat16).float())"),
    ],
    "dequantize(weight, None, torch.float32)) * scale.reshape(-1)": [
        (ROUNDS, "dequantize(weight, None, torch.float32))"),
        (ROUNDS, "dequantize(weight, None, torch.float32)) / scale.reshape(-1)"),
        (ROUNDS, "dequantize(weight, None, torch.float32)) * scale"),
    ],
    "    codes = quantize(x, input_scale, weight.dtype, call.full_scale)": [
        (NUMBERS, "    codes = quantize(x, input_scale.reciprocal(), weight.dtype, call.full_scale)"),
        (NUMBERS, "    codes = quantize(x, weight_scale, weight.dtype, call.full_scale)"),
        (FORMATS, "    codes = quantize(x, input_scale, torch.float8_e4m3fn, call.full_scale)"),
        (ON_GAUDI3, "    codes = quantize(x, input_scale, weight.dtype, 448.0)"),
    ],
    "    if group := _block(call, input_scale):\n": [
        (BLOCKS, "    if group := 0:\n"),
    ],
    "input_scale = input_scale.expand(*x.shape[:-1], size // group).contiguous()": [
        (BLOCKS, "pass"),
    ],
    "weight_scale.expand(out // group, size // group).t().contiguous()": [
        (BLOCKS, "weight_scale.expand(out // group, size // group).contiguous()"),
        (BLOCKS, "weight_scale.expand(size // group, out // group).contiguous()"),
    ],
    "        weight_scale = weight_scale.reshape(-1)\n": [
        (NUMBERS, "        pass\n"),
    ],
    "gemm(codes, weight.t(), input_scale, weight_scale, dtype)": [
        (STATIC, "gemm(codes, weight, input_scale, weight_scale, dtype)"),
        (UNPACKED, "gemm(codes, weight.t().contiguous(), input_scale, weight_scale, dtype)"),
        (NUMBERS, "gemm(codes, weight.t(), weight_scale, input_scale, dtype)"),
        (NUMBERS, "gemm(codes, weight.t(), input_scale.reciprocal(), weight_scale, dtype)"),
        (NUMBERS, "gemm(codes, weight.t(), input_scale, weight_scale.reciprocal(), dtype)"),
        (ROUNDS, "gemm(codes, weight.t(), input_scale, weight_scale, torch.bfloat16)"),
        (FUSED, "gemm(codes, weight.t(), input_scale, weight_scale, torch.float32)"),
    ],
}
