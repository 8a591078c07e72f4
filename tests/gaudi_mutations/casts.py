"""Mistakes in `ops/hpu/casts.py`, and the tests that fail with them."""

CAST_CONSTANT_E4M3_GAUDI2 = "tests/ops/hpu/test_casts.py::test_there_and_back[constant-E4M3-gaudi2]"
CAST_CONSTANT_E5M2_GAUDI3 = "tests/ops/hpu/test_casts.py::test_there_and_back[constant-E5M2-gaudi3]"
CAST_ROWS_E4M3_GAUDI2 = "tests/ops/hpu/test_casts.py::test_there_and_back[rows-E4M3-gaudi2]"
CAST_ROWS_E5M2_GAUDI3 = "tests/ops/hpu/test_casts.py::test_there_and_back[rows-E5M2-gaudi3]"
REFUSES_CODES_CODES = "tests/ops/hpu/test_casts.py::test_codes_that_the_card_cannot_make_are_refused[codes]"
REFUSES_CODES_DTYPE = "tests/ops/hpu/test_casts.py::test_codes_that_the_card_cannot_make_are_refused[dtype]"
REFUSES_CODES_LARGER_FULL_SCALE = (
    "tests/ops/hpu/test_casts.py::test_codes_that_the_card_cannot_make_are_refused[larger full scale]"
)
REFUSES_CODES_OTHER_FULL_SCALE = (
    "tests/ops/hpu/test_casts.py::test_codes_that_the_card_cannot_make_are_refused[other full scale]"
)
REFUSES_CODES_SCALES = "tests/ops/hpu/test_casts.py::test_codes_that_the_card_cannot_make_are_refused[scales]"
REFUSES_VALUES_DTYPE = "tests/ops/hpu/test_casts.py::test_values_that_the_card_cannot_make_are_refused[dtype]"
BLOCKS = "tests/ops/hpu/test_linear.py::test_scales_by_blocks[gaudi2]"
SATURATES = "tests/ops/hpu/test_linear.py::test_codes_saturate_at_the_targets_full_scale"
CACHE_CODES = "tests/ops/hpu/test_attention.py::test_codes_of_a_cache_are_taken_as_they_are"
GIVEN = "tests/ops/hpu/test_attention.py::test_what_the_kernel_is_given"

FAILS: dict[str, list[tuple[str, str]]] = {
    "    if call.x.dtype not in HIGH_PRECISION and call.x.dtype != call.dtype:\n": [
        (REFUSES_CODES_DTYPE, "    if False:\n"),
    ],
    "refuses_full_scale(call.x, call.dtype, call.full_scale) or refuses_scale(call.x, call.scale)": [
        (REFUSES_CODES_LARGER_FULL_SCALE, "refuses_scale(call.x, call.scale)"),
        (REFUSES_CODES_SCALES, "refuses_full_scale(call.x, call.dtype, call.full_scale)"),
    ],
    "    if call.dtype not in HIGH_PRECISION:\n": [
        (REFUSES_VALUES_DTYPE, "    if False:\n"),
    ],
    "    if full_scale > largest(dtype):": [
        (REFUSES_CODES_LARGER_FULL_SCALE, "    if False:"),
    ],
    "    if full_scale < largest(dtype) and (is_fp8(x.dtype) or full_scale not in _FULL_SCALES[dtype]):": [
        (SATURATES, "    if full_scale < largest(dtype):"),
        (REFUSES_CODES_CODES, "    if False:"),
        (REFUSES_CODES_CODES, "    if full_scale < largest(dtype) and full_scale not in _FULL_SCALES[dtype]:"),
        (REFUSES_CODES_OTHER_FULL_SCALE, "    if full_scale < largest(dtype) and is_fp8(x.dtype):"),
    ],
    "quantize(call.x, call.scale, call.dtype, call.full_scale)": [
        (SATURATES, "quantize(call.x, call.scale, call.dtype, largest(call.dtype))"),
    ],
    "_wide(x), spread(scale, x)": [
        (CAST_CONSTANT_E4M3_GAUDI2, "x, spread(scale, x)"),
        (BLOCKS, "_wide(x), scale"),
    ],
    "if full_scale < largest(dtype):": [
        (SATURATES, "if False:"),
    ],
    "scale if constant is None else constant, full_scale)": [
        (SATURATES, "scale if constant is None else 1.0 / constant, full_scale)"),
    ],
    'if constant is not None:\n        return operator("cast_to': [
        (CAST_CONSTANT_E4M3_GAUDI2, 'if False:\n        return operator("cast_to'),
    ],
    'operator("cast_to_fp8_v2", "scalar")(x, 1.0 / constant,': [
        (CAST_CONSTANT_E4M3_GAUDI2, 'operator("cast_to_fp8_v2")(x, torch.tensor([1.0 / constant]),'),
    ],
    "(x, 1.0 / constant, False, False, dtype)": [
        (CAST_CONSTANT_E4M3_GAUDI2, "(x, constant, False, False, dtype)"),
        (CAST_CONSTANT_E4M3_GAUDI2, "(x, 1.0 / constant, True, False, dtype)"),
        (CAST_CONSTANT_E4M3_GAUDI2, "(x, 1.0 / constant, False, True, dtype)"),
        (CAST_CONSTANT_E4M3_GAUDI2, "(x.bfloat16(), 1.0 / constant, False, False, dtype)"),
        (CAST_CONSTANT_E5M2_GAUDI3, "(x, 1.0 / constant, False, False, torch.float8_e4m3fn)"),
    ],
    'operator("cast_to_fp8_v2")(x, inverse_of(scale),': [
        (CAST_ROWS_E4M3_GAUDI2, 'operator("cast_to_fp8_v2", "scalar")(x, 1.0 / scale.mean().item(),'),
    ],
    "(x, inverse_of(scale), False, False, dtype)": [
        (CAST_ROWS_E4M3_GAUDI2, "(x, scale, False, False, dtype)"),
        (CAST_ROWS_E4M3_GAUDI2, "(inverse_of(scale), x, False, False, dtype)"),
        (CAST_ROWS_E4M3_GAUDI2, "(x, inverse_of(scale), True, False, dtype)"),
        (CAST_ROWS_E4M3_GAUDI2, "(x, inverse_of(scale), False, True, dtype)"),
        (CAST_ROWS_E5M2_GAUDI3, "(x, inverse_of(scale), False, False, torch.float8_e4m3fn)"),
    ],
    "x if is_fp8(x.dtype) else quantize(x, scale, dtype, full_scale)": [
        (GIVEN, "x if is_fp8(x.dtype) else quantize(x, scale.reciprocal(), dtype, full_scale)"),
        (CACHE_CODES, "quantize(x, scale, dtype, full_scale)"),
    ],
    "None if scale is None else spread(scale, codes)": [
        (BLOCKS, "scale"),
    ],
    "dtype if dtype in WIDE else torch.float32": [
        (CAST_CONSTANT_E4M3_GAUDI2, "dtype if dtype in WIDE else torch.bfloat16"),
    ],
    'operator("cast_from_fp8", "scalar")(codes, constant,': [
        (CAST_CONSTANT_E4M3_GAUDI2, 'operator("cast_from_fp8")(codes, scale,'),
    ],
    "(codes, constant, wide)": [
        (CAST_CONSTANT_E4M3_GAUDI2, "(codes, 1.0 / constant, wide)"),
        (CAST_CONSTANT_E4M3_GAUDI2, "(codes, constant, torch.float32)"),
        (CAST_CONSTANT_E4M3_GAUDI2, "(codes, constant, torch.bfloat16)"),
        (CAST_CONSTANT_E4M3_GAUDI2, "(codes.view(torch.float8_e5m2), constant, wide)"),
    ],
    'operator("cast_from_fp8")(codes, scale,': [
        (
            CAST_ROWS_E4M3_GAUDI2,
            'operator("cast_from_fp8", "scalar")(codes, 1.0 if scale is None else scale.mean().item(),',
        ),
    ],
    "(codes, scale, wide)": [
        (CAST_ROWS_E4M3_GAUDI2, "(codes, None if scale is None else scale.reciprocal(), wide)"),
        (CAST_ROWS_E4M3_GAUDI2, "(codes, None, wide)"),
        (CAST_ROWS_E4M3_GAUDI2, "(scale, codes, wide)"),
        (CAST_ROWS_E4M3_GAUDI2, "(codes, scale, torch.float32)"),
        (CAST_ROWS_E4M3_GAUDI2, "(codes, scale, torch.bfloat16)"),
    ],
    "scale if scale.numel() == 1 else broadcast_scale(scale, x)": [
        (CAST_CONSTANT_E4M3_GAUDI2, "broadcast_scale(scale, x)"),
    ],
    "x.float() if x.dtype == torch.float16 else x": [
        (CAST_CONSTANT_E4M3_GAUDI2, "x.bfloat16() if x.dtype == torch.float16 else x"),
    ],
    "bound = scale * full_scale": [
        (SATURATES, "bound = full_scale / scale"),
        (SATURATES, "bound = scale"),
        (SATURATES, "bound = full_scale"),
    ],
    "        return x.clamp(-bound, bound)": [
        (SATURATES, "        return x"),
        (SATURATES, "        return x.clamp(0.0, bound)"),
        (SATURATES, "        return x.clamp(-bound)"),
    ],
    "    bound = bound.to(x.dtype)\n    return x.clamp(-bound, bound)": [
        (SATURATES, "    bound = bound.to(x.dtype)\n    return x"),
        (SATURATES, "    bound = bound.to(x.dtype)\n    return x.clamp(0 * bound, bound)"),
        (SATURATES, "    bound = bound.to(x.dtype)\n    return x.clamp(-bound)"),
    ],
    "    bound = bound.to(x.dtype)\n    return": [
        (SATURATES, "    return"),
    ],
}
