"""Mistakes in `ops/hpu/gemm.py`, and the tests that fail with them."""

BLOCKS = "tests/ops/hpu/test_linear.py::test_scales_by_blocks[gaudi2]"
FUSED = "tests/ops/hpu/test_linear.py::test_fused_arithmetic_adds_the_bias_before_it_rounds"
NO_BLOCKS = "tests/ops/hpu/test_linear.py::test_an_older_bridge_takes_no_blocks"
NUMBERS = "tests/ops/hpu/test_linear.py::test_numbers_are_given_only_for_both_scales"
ROUNDS = "tests/ops/hpu/test_linear.py::test_rounds_where_the_arithmetic_says[gaudi2]"
STATIC = "tests/ops/hpu/test_linear.py::test_a_static_layer_is_a_cast_and_a_product_without_bias"
UNPACKED = "tests/ops/hpu/test_linear.py::test_a_weight_that_was_not_packed_is_read_transposed"
CACHED = "tests/ops/hpu/test_matmul.py::test_a_product_with_cached_keys_reads_them_as_they_lie_in_memory"

FAILS: dict[str, list[tuple[str, str]]] = {
    "    b, transposed = _stored(b)\n": [
        (UNPACKED, "    transposed = False\n"),
    ],
    "constant_of(a_scale), constant_of(b_scale)": [
        (STATIC, "constant_of(b_scale), constant_of(a_scale)"),
    ],
    "left is not None and right is not None": [
        (STATIC, "False"),
        (NUMBERS, "left is not None or right is not None"),
        (NUMBERS, "left is not None"),
    ],
    'operator("fp8_gemm_v2", "scalar")(a, False, b, transposed, None, dtype, left, right)': [
        (STATIC, 'operator("fp8_gemm_v2")(a, False, b, transposed, None, dtype, a_scale, b_scale)'),
    ],
    "(a, False, b, transposed, None, dtype, left, right)": [
        (STATIC, "(a, False, b, transposed, None, dtype, 1.0 / left, right)"),
        (STATIC, "(a, False, b, transposed, None, dtype, left, 1.0 / right)"),
        (STATIC, "(a, False, b, transposed, None, dtype, right, left)"),
        (STATIC, "(b, transposed, a, False, None, dtype, left, right)"),
        (STATIC, "(a, True, b, transposed, None, dtype, left, right)"),
        (STATIC, "(a, False, b, not transposed, None, dtype, left, right)"),
        (STATIC, "(a, False, b, transposed, torch.zeros(1), dtype, left, right)"),
        (STATIC, "(a, False, b, transposed, None, torch.float32, left, right)"),
        (STATIC, "(a, False, b, transposed, None, dtype, left, right, torch.zeros(1))"),
        (CACHED, "(a, transposed, b, False, None, dtype, left, right)"),
        (ROUNDS, "(a, False, b, transposed, None, torch.bfloat16, left, right)"),
    ],
    'operator("fp8_gemm_v2")(': [
        (NUMBERS, 'operator("fp8_gemm_v2", "scalar")('),
    ],
    "(a, False, b, transposed, None, dtype, a_scale, b_scale)": [
        (ROUNDS, "(a, False, b, transposed, None, torch.bfloat16, a_scale, b_scale)"),
        (NUMBERS, "(a, False, b, transposed, None, dtype, a_scale.reciprocal(), b_scale)"),
        (NUMBERS, "(a, False, b, transposed, None, dtype, a_scale, b_scale.reciprocal())"),
        (NUMBERS, "(a, False, b, transposed, None, dtype, b_scale, a_scale)"),
        (NUMBERS, "(b, transposed, a, False, None, dtype, a_scale, b_scale)"),
        (NUMBERS, "(a, True, b, transposed, None, dtype, a_scale, b_scale)"),
        (NUMBERS, "(a, False, b, not transposed, None, dtype, a_scale, b_scale)"),
        (NUMBERS, "(a, False, b, transposed, torch.zeros(1), dtype, a_scale, b_scale)"),
        (NUMBERS, "(a, False, b, transposed, None, dtype, a_scale, b_scale, torch.zeros(1))"),
        (UNPACKED, "(a, transposed, b, False, None, dtype, a_scale, b_scale)"),
        (FUSED, "(a, False, b, transposed, None, torch.float32, a_scale, b_scale)"),
    ],
    'offers("cast_to_fp8_just_in_time")': [
        (NO_BLOCKS, "True"),
        (BLOCKS, "False"),
    ],
    "(b.mT, True) if": [
        (UNPACKED, "(b.mT, False) if"),
        (UNPACKED, "(b, True) if"),
    ],
    "else (b, False)": [
        (STATIC, "else (b, True)"),
    ],
}
