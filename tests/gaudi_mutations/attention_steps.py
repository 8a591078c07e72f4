"""Mistakes in `ops/hpu/attention_steps.py`, and the tests that fail with them."""

_FILE = "tests/ops/hpu/test_attention_steps.py"
CAPPED = f"{_FILE}::test_soft_caps"
DTYPES = f"{_FILE}::test_other_dtypes"
E5M2 = f"{_FILE}::test_e5m2"
FLOAT32 = f"{_FILE}::test_a_fused_dataflow_leaves_float32_between_steps"
GIVEN = f"{_FILE}::test_what_operators_are_given"
GROUPS = f"{_FILE}::test_heads_that_share_keys"
MASKS = f"{_FILE}::test_masks"
PARTS = f"{_FILE}::test_operands_that_are_not_rounded"
REFUSED = f"{_FILE}::test_what_does_not_fit_is_refused"
ROUNDED = f"{_FILE}::test_rounded_products[gaudi2]"
SATURATES = f"{_FILE}::test_codes_that_saturate_earlier_than_the_cards"
SINKS = f"{_FILE}::test_sinks"
SOFTMAX = f"{_FILE}::test_softmax[gaudi2]"
SOFTMAX_REFUSED = f"{_FILE}::test_softmax_refuses"

OF_REFUSALS: dict[str, list[tuple[str, str]]] = {
    "    if query.dtype not in HIGH_PRECISION:\n": [
        (REFUSED, "    if False:\n"),
    ],
    "    if call.dataflow not in DATAFLOWS:\n": [
        (REFUSED, "    if False:\n"),
    ],
    "        operands.append(": [
        (REFUSED, "        list("),
    ],
    "        single.append(": [
        (REFUSED, "        list("),
    ],
    "reason := _refuses_operand(call, x, scale):": [
        (REFUSED, "reason := None:"),
    ],
    "        if scale is not None and scale.numel() != 1:\n": [
        (REFUSED, "        if False:\n"),
    ],
    "refuses_full_scale(query, call.dtype, call.full_scale)": [
        (REFUSED, "None"),
    ],
    "    if x.dtype not in HIGH_PRECISION and x.dtype != call.dtype:\n": [
        (REFUSED, "    if False:\n"),
        (PARTS, "    if x.dtype not in HIGH_PRECISION:\n"),
    ],
    '        if is_fp8(x.dtype):\n            return "that': [
        (REFUSED, '        if False:\n            return "that'),
    ],
    'f"in {x.dtype}" if call.dataflow == "qdq" and x.dtype != call.query.dtype else None': [
        (REFUSED, "None"),
    ],
    "scale.shape in ((x.shape[1], 1, 1), (*x.shape[:3], 1))": [
        (REFUSED, "True"),
        (ROUNDED, "scale.shape == (x.shape[1], 1, 1)"),
        (ROUNDED, "scale.shape == (*x.shape[:3], 1)"),
    ],
    "    if call.x.dtype not in HIGH_PRECISION:\n": [
        (SOFTMAX_REFUSED, "    if False:\n"),
    ],
    "    if call.scale.numel() != 1:\n": [
        (SOFTMAX_REFUSED, "    if False:\n"),
    ],
    "refuses_full_scale(call.x, call.dtype, call.full_scale)": [
        (SOFTMAX_REFUSED, "None"),
    ],
}

OF_PRODUCTS: dict[str, list[tuple[str, str]]] = {
    "call.output_scale if call.dataflow in FUSED else None": [
        (ROUNDED, "call.output_scale"),
        (ROUNDED, "call.output_scale if call.dataflow not in FUSED else None"),
        (ROUNDED, "None"),
    ],
    "query.dtype if output_scale is None else torch.float32": [
        (FLOAT32, "query.dtype"),
        (ROUNDED, "torch.float32"),
    ],
    "_product(call, probabilities, call.value, call.p_scale, call.v_scale, dtype)": [
        (ROUNDED, "_product(call, probabilities, call.key, call.p_scale, call.v_scale, dtype)"),
        (ROUNDED, "_product(call, probabilities, call.value, call.v_scale, call.p_scale, dtype)"),
        (ROUNDED, "_product(call, probabilities, call.value, call.p_scale, call.k_scale, dtype)"),
        (ROUNDED, "_product(call, probabilities, call.value, call.p_scale, None, dtype)"),
        (ROUNDED, "_product(call, probabilities, call.value, None, call.v_scale, dtype)"),
    ],
    "    if output_scale is not None:\n": [
        (ROUNDED, "    if False:\n"),
    ],
    "quantize(output, output_scale, call.dtype, call.full_scale)": [
        (ROUNDED, "quantize(output, output_scale.reciprocal(), call.dtype, call.full_scale)"),
        (E5M2, "quantize(output, output_scale, torch.float8_e4m3fn, 240.0)"),
    ],
    "dequantize(codes, output_scale, query.dtype)": [
        (ROUNDED, "dequantize(codes, output_scale.reciprocal(), query.dtype)"),
        (DTYPES, "dequantize(codes, output_scale, torch.bfloat16)"),
    ],
    "output.transpose(1, 2).contiguous()": [
        (ROUNDED, "output.transpose(1, 2)"),
        (ROUNDED, "output.contiguous()"),
    ],
    "    if call.p_scale is not None:\n": [
        (ROUNDED, "    if False:\n"),
    ],
    "probabilities.to(dtype).contiguous()": [
        (PARTS, "probabilities.contiguous()"),
        (SINKS, "probabilities.to(dtype)"),
    ],
    "dequantize(probabilities, call.p_scale, dtype)": [
        (ROUNDED, "dequantize(probabilities, call.p_scale.reciprocal(), dtype)"),
        (ROUNDED, "dequantize(probabilities, None, dtype)"),
    ],
    "_rounded(call, query, q_scale), _rounded(call, call.key, k_scale)": [
        (ROUNDED, "_rounded(call, query, k_scale), _rounded(call, call.key, k_scale)"),
        (ROUNDED, "_rounded(call, query, q_scale), _rounded(call, call.key, q_scale)"),
        (GIVEN, "_rounded(call, query, q_scale), call.key"),
        (GIVEN, "query, _rounded(call, call.key, k_scale)"),
    ],
    "    if q_scale is not None and q_scale.numel() > 1:": [
        (ROUNDED, "    if False:"),
    ],
    "expand(*q_scale.shape[:-2], query.shape[2], 1)": [
        (ROUNDED, "expand(*q_scale.shape[:-2], -1, 1)"),
    ],
    "        k_scale = k_scale.mT\n": [
        (ROUNDED, "        pass\n"),
        (PARTS, "        pass\n"),
    ],
    "torch.float32 if call.dataflow in FUSED else query.dtype": [
        (FLOAT32, "query.dtype"),
        (ROUNDED, "torch.float32"),
    ],
    "_product(call, rows, keys.mT, q_scale, k_scale, dtype)": [
        (ROUNDED, "_product(call, rows, keys.mT, k_scale, q_scale, dtype)"),
        (ROUNDED, "_product(call, rows, keys.mT, q_scale, None, dtype)"),
        (ROUNDED, "_product(call, rows, keys.mT, None, k_scale, dtype)"),
    ],
    "_product(call, rows, keys.mT, q_scale, k_scale, ": [
        (ROUNDED, "_product(call, rows, keys.mT, q_scale.reciprocal(), k_scale, "),
        (ROUNDED, "_product(call, rows, keys.mT, q_scale, k_scale.reciprocal(), "),
    ],
    "scores.unflatten(2, (shared, query.shape[2]))": [
        (ROUNDED, "scores.unflatten(2, (query.shape[2], shared))"),
    ],
    "query.shape[2])), call)\n": [
        (ROUNDED, "query.shape[2])), call._replace(mask=None))\n"),
        (SINKS, "query.shape[2])), call._replace(sinks=None))\n"),
        (CAPPED, "query.shape[2])), call._replace(softcap=0.0))\n"),
        (ROUNDED, "query.shape[2])), call._replace(scaling=1.0))\n"),
    ],
    "_softmax(call, scores, p_scale)[..., : call.key.shape[2]]": [
        (SINKS, "_softmax(call, scores, p_scale)"),
        (PARTS, "_softmax(call, scores, None)[..., : call.key.shape[2]]"),
    ],
    "x if scale is None else codes_of(x, scale, call.dtype, call.full_scale)": [
        (ROUNDED, "x if scale is None else codes_of(x, scale.reciprocal(), call.dtype, call.full_scale)"),
        (E5M2, "x if scale is None else codes_of(x, scale, torch.float8_e4m3fn, 240.0)"),
    ],
    '"qdq" if call.dataflow == "qdq" else "gaudi"': [
        (ROUNDED, '"gaudi"'),
        (ROUNDED, '"qdq"'),
    ],
    "MatmulCall(a, b, a_scale, b_scale, call.dtype, call.full_scale, arithmetic)": [
        (ROUNDED, "MatmulCall(a, b, b_scale, a_scale, call.dtype, call.full_scale, arithmetic)"),
        (E5M2, "MatmulCall(a, b, a_scale, b_scale, torch.float8_e4m3fn, 240.0, arithmetic)"),
    ],
    "rows.unflatten(2, (-1, call.query.shape[2]))": [
        (GROUPS, "rows.unflatten(2, (call.query.shape[2], -1))"),
    ],
}

OF_SOFTMAX: dict[str, list[tuple[str, str]]] = {
    "p_scale is not None and _is_rounded_by_the_softmax(call, scores)": [
        (GIVEN, "False"),
        (PARTS, "_is_rounded_by_the_softmax(call, scores)"),
        (DTYPES, "p_scale is not None and not _is_rounded_by_the_softmax(call, scores)"),
    ],
    "scores.float().softmax(dim=-1)": [
        (E5M2, "scores.softmax(dim=-1)"),
        (ROUNDED, "scores.float().softmax(dim=-2)"),
    ],
    "    if rounds_probabilities(call.dataflow, p_scale):\n": [
        (ROUNDED, "    if False:\n"),
        (E5M2, "    if True:\n"),
    ],
    "probabilities.to(call.query.dtype)": [
        (DTYPES, "probabilities.to(torch.bfloat16)"),
    ],
    "quantize(probabilities, p_scale, call.dtype, call.full_scale)": [
        (ROUNDED, "quantize(probabilities, p_scale.reciprocal(), call.dtype, call.full_scale)"),
        (E5M2, "quantize(probabilities, p_scale, torch.float8_e4m3fn, 240.0)"),
    ],
    'once = call.dataflow == "unfused_gaudi"': [
        (ROUNDED, "once = True"),
        (ROUNDED, 'once = call.dataflow != "unfused_gaudi"'),
    ],
    "return once and _is_of_the_operator(scores, call.dtype, call.full_scale)": [
        (E5M2, "return once"),
    ],
    "x.dtype == torch.bfloat16 and dtype": [
        (DTYPES, "dtype"),
    ],
    'dtype == FP8_DTYPES["E4M3"] and': [
        (E5M2, "True and"),
    ],
    " and saturates_at == full_scale(dtype)": [
        (SATURATES, ""),
    ],
    "(constant := constant_of(scale)) is not None": [
        (GIVEN, "(constant := None) is not None"),
    ],
    'operator("softmax_fp8", "Scalar_scales")(x, dim, 1.0, 1.0 / constant, factor)': [
        (GIVEN, 'operator("softmax_fp8")(x, dim, torch.ones_like(scale), scale.reciprocal(), factor)'),
        (GIVEN, 'operator("softmax_fp8", "Scalar_scales")(x, dim, 1.0, constant, factor)'),
        (GIVEN, 'operator("softmax_fp8", "Scalar_scales")(x, dim, 1.0 / constant, 1.0, factor)'),
        (GIVEN, 'operator("softmax_fp8", "Scalar_scales")(x.float(), dim, 1.0, 1.0 / constant, factor)'),
        (ROUNDED, 'operator("softmax_fp8", "Scalar_scales")(-x, dim, 1.0, 1.0 / constant, factor)'),
        (SOFTMAX, 'operator("softmax_fp8", "Scalar_scales")(x, -1, 1.0, 1.0 / constant, factor)'),
        (SOFTMAX, 'operator("softmax_fp8", "Scalar_scales")(x, dim, 1.0, 1.0 / constant, None)'),
    ],
    'operator("softmax_fp8")(x, dim, torch.ones_like(scale), inverse_of(scale), factor)': [
        (GIVEN, 'operator("softmax_fp8", "Scalar_scales")(x, dim, 1.0, 1.0 / scale.item(), factor)'),
        (GIVEN, 'operator("softmax_fp8")(x, dim, torch.ones_like(scale), scale, factor)'),
        (GIVEN, 'operator("softmax_fp8")(x, dim, inverse_of(scale), torch.ones_like(scale), factor)'),
        (ROUNDED, 'operator("softmax_fp8")(-x, dim, torch.ones_like(scale), inverse_of(scale), factor)'),
        (SOFTMAX, 'operator("softmax_fp8")(x, -1, torch.ones_like(scale), inverse_of(scale), factor)'),
        (SOFTMAX, 'operator("softmax_fp8")(x, dim, torch.ones_like(scale), inverse_of(scale), None)'),
    ],
    "    if _is_of_the_operator(x, call.dtype, call.full_scale):\n": [
        (SOFTMAX, "    if False:\n"),
        (SOFTMAX, "    if True:\n"),
    ],
    "dequantize(_rounding_softmax(x, scale, factor, call.dim), scale, x.dtype)": [
        (SOFTMAX, "dequantize(_rounding_softmax(x, scale, factor), scale, x.dtype)"),
        (SOFTMAX, "dequantize(_rounding_softmax(x, scale, None, call.dim), scale, x.dtype)"),
        (SOFTMAX, "dequantize(_rounding_softmax(x, scale, factor, call.dim), scale.reciprocal(), x.dtype)"),
    ],
    "x.float() if factor is None else x.float() * factor": [
        (SOFTMAX, "x.float()"),
        (SOFTMAX, "x.float() if factor is None else x.float() / factor"),
    ],
    "dequantize(quantize(wide.softmax(call.dim), scale, call.dtype, call.full_scale), scale, x.dtype)": [
        (SOFTMAX, "dequantize(quantize(wide.softmax(-1), scale, call.dtype, call.full_scale), scale, x.dtype)"),
        (SOFTMAX, "wide.softmax(call.dim).to(x.dtype)"),
        (SATURATES, "dequantize(quantize(wide.softmax(call.dim), scale, call.dtype, 448.0), scale, x.dtype)"),
    ],
    "call.full_scale), scale, x.dtype)": [
        (SOFTMAX, "call.full_scale), scale.reciprocal(), x.dtype)"),
        (SOFTMAX, "call.full_scale), scale, torch.float32)"),
    ],
    "quantize(wide.softmax(call.dim), scale, ": [
        (SOFTMAX, "quantize(wide.softmax(call.dim), scale.reciprocal(), "),
    ],
}

FAILS = OF_REFUSALS | OF_PRODUCTS | OF_SOFTMAX
