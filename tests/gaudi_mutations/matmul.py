"""Mistakes in `ops/hpu/matmul.py`, and the tests that fail with them."""

CACHED = "tests/ops/hpu/test_matmul.py::test_a_product_with_cached_keys_reads_them_as_they_lie_in_memory"
MATMUL = "tests/ops/hpu/test_matmul.py::test_value"
MATMUL_REFUSED = "tests/ops/hpu/test_matmul.py::test_what_does_not_fit_is_refused"
MATMUL_SHAPES = "tests/ops/hpu/test_matmul.py::test_shapes[gaudi2]"
POSITIONS = "tests/ops/hpu/test_matmul.py::test_values_with_a_scale_for_each_position_are_dequantized"
TRANSPOSED = "tests/ops/hpu/test_matmul.py::test_a_transposed_operand_is_cast_as_it_lies_in_memory"

FAILS: dict[str, list[tuple[str, str]]] = {
    "((a, call.a_scale, -1), (b, call.b_scale, None))": [
        (POSITIONS, "((a, call.a_scale, -1), (b, call.b_scale, -2))"),
        (MATMUL_REFUSED, "((a, call.a_scale, None), (b, call.b_scale, None))"),
    ],
    " or _varies_twice(scale):": [
        (MATMUL_REFUSED, ":"),
    ],
    "    return refuses_full_scale(a, call.dtype, call.full_scale)": [
        (MATMUL_REFUSED, "    return None"),
    ],
    '    if call.arithmetic == "qdq":\n': [
        (MATMUL, "    if False:\n"),
    ],
    "product(call, call.a.dtype)": [
        (MATMUL, "product(call, torch.float32)"),
    ],
    "_rounded_back(call, a, a_scale, dtype), _rounded_back(call, b, b_scale, dtype)": [
        (MATMUL, "_rounded_back(call, a, b_scale, dtype), _rounded_back(call, b, a_scale, dtype)"),
    ],
    "b_scale.shape[-2] > 1\n": [
        (POSITIONS, "b_scale.shape[-1] > 1\n"),
    ],
    "a_scale is None or b_scale is None or by_rows": [
        (POSITIONS, "a_scale is None or b_scale is None"),
    ],
    "dtype if dtype in WIDE else torch.float32": [
        (MATMUL, "dtype if dtype in WIDE else torch.bfloat16"),
    ],
    "gemm(_codes(call, a, a_scale), _codes(call, b, b_scale), a_scale, b_scale, wide)": [
        (MATMUL, "gemm(_codes(call, a, a_scale), _codes(call, b, b_scale), b_scale, a_scale, wide)"),
        (MATMUL, "gemm(_codes(call, a, b_scale), _codes(call, b, a_scale), a_scale, b_scale, wide)"),
        (MATMUL, "gemm(_codes(call, a, a_scale), _codes(call, b, b_scale), a_scale, b_scale, torch.bfloat16)"),
        (CACHED, "gemm(_codes(call, a, a_scale), _codes(call, b, b_scale), a_scale, b_scale, torch.float32)"),
    ],
    "_codes(call, b, b_scale), a_scale, b_scale, wide)": [
        (MATMUL_SHAPES, "_codes(call, b, b_scale), a_scale.reciprocal(), b_scale, wide)"),
        (MATMUL_SHAPES, "_codes(call, b, b_scale), a_scale, b_scale.reciprocal(), wide)"),
    ],
    "a_scale, b_scale, wide).to(dtype)": [
        (MATMUL, "a_scale, b_scale, wide)"),
    ],
    "    if not is_fp8(x.dtype) and not x.is_contiguous() and x.mT.is_contiguous():\n": [
        (TRANSPOSED, "    if False:\n"),
        (CACHED, "    if not x.is_contiguous() and x.mT.is_contiguous():\n"),
    ],
    "quantize(x.mT, scale.mT if scale.ndim > 1 else scale, call.dtype, call.full_scale).mT": [
        (MATMUL, "quantize(x.mT, scale.mT if scale.ndim > 1 else scale, call.dtype, call.full_scale)"),
        (MATMUL, "quantize(x.mT, scale, call.dtype, call.full_scale).mT"),
        (MATMUL, "quantize(x.mT, scale.mT, call.dtype, call.full_scale).mT"),
        (TRANSPOSED, "quantize(x, scale, call.dtype, call.full_scale)"),
    ],
    "codes_of(x, scale, call.dtype, call.full_scale)": [
        (MATMUL_SHAPES, "codes_of(x, scale.reciprocal(), call.dtype, call.full_scale)"),
        (MATMUL_SHAPES, "codes_of(x, scale, torch.float8_e5m2, call.full_scale)"),
        (CACHED, "quantize(x, scale, call.dtype, call.full_scale)"),
    ],
    "x if scale is None else dequantize(_codes(call, x, scale), scale, dtype)": [
        (MATMUL, "x if scale is None else dequantize(_codes(call, x, scale), scale.reciprocal(), dtype)"),
        (MATMUL, "x if scale is None else dequantize(_codes(call, x, scale), scale, torch.float32)"),
    ],
    "_values(call, call.a, call.a_scale), _values(call, call.b, call.b_scale, by_rows)": [
        (POSITIONS, "_values(call, call.a, call.a_scale), _values(call, call.b, call.b_scale)"),
        (POSITIONS, "_values(call, call.a, call.b_scale), _values(call, call.b, call.a_scale, by_rows)"),
    ],
    "(call.a_scale, None if by_rows else call.b_scale)": [
        (MATMUL, "(call.a_scale,)"),
        (POSITIONS, "(call.a_scale, call.b_scale)"),
        (POSITIONS, "(None if by_rows else call.b_scale,)"),
    ],
    "result if scale is None else result * scale": [
        (POSITIONS, "result if scale is None else result / scale"),
    ],
    "_high_precision(call, by_rows).to(dtype)": [
        (POSITIONS, "_high_precision(call, by_rows)"),
    ],
    "scale if scaled else None, torch.float32)": [
        (MATMUL, "scale, torch.float32)"),
        (POSITIONS, "None, torch.float32)"),
        (POSITIONS, "scale if scaled else None, torch.bfloat16).float()"),
        (POSITIONS, "scale.reciprocal() if scaled else None, torch.float32)"),
    ],
}
