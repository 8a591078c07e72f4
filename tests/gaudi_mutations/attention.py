"""Mistakes in `ops/hpu/attention.py`, and the tests that fail with them."""

ATTENTION_FLOAT32 = "tests/ops/hpu/test_attention.py::test_float32"
CACHE_CODES = "tests/ops/hpu/test_attention.py::test_codes_of_a_cache_are_taken_as_they_are"
GIVEN = "tests/ops/hpu/test_attention.py::test_what_the_kernel_is_given"
MASKS = "tests/ops/hpu/test_attention.py::test_masks"
NO_OPERATOR = "tests/ops/hpu/test_attention.py::test_a_bridge_without_the_kernel_is_told[operator]"
RECOMPUTE = "tests/ops/hpu/test_attention.py::test_recompute_is_stated"
ROUNDED = "tests/ops/hpu/test_attention_steps.py::test_rounded_products[gaudi2]"
WITHOUT_OUTPUT = "tests/ops/hpu/test_attention.py::test_without_a_scale_of_the_output"
TOLD = {
    name: f"tests/ops/hpu/test_attention_steps.py::test_what_is_not_in_the_fused_kernel_is_told[fused-{name}]"
    for name in (
        *("full scale", "mask", "no scale", "output", "probabilities", "queries", "scales", "sinks", "soft cap"),
        "values",
    )
}

FAILS: dict[str, list[tuple[str, str]]] = {
    "_not_in_the_kernel(call) if call.dataflow in FUSED else None": [
        (TOLD["soft cap"], "_not_in_the_kernel(call)"),
        (TOLD["soft cap"], "_not_in_the_kernel(call) if call.dataflow not in FUSED else None"),
    ],
    "call.dataflow not in FUSED or _not_in_the_kernel(call) is not None": [
        (TOLD["soft cap"], "call.dataflow not in FUSED or _not_in_the_kernel(call) is None"),
        (ROUNDED, "_not_in_the_kernel(call) is not None"),
        (TOLD["soft cap"], "call.dataflow not in FUSED"),
    ],
    "    if query.dtype != torch.bfloat16 and call.output_scale is None:\n": [
        (TOLD["output"], "    if False:\n"),
        (ATTENTION_FLOAT32, "    if query.dtype != torch.bfloat16:\n"),
    ],
    "    if call.output_scale is not None and call.full_scale < full_scale(call.dtype):\n": [
        (TOLD["full scale"], "    if False:\n"),
        (WITHOUT_OUTPUT, "    if call.output_scale is None or call.full_scale < full_scale(call.dtype):\n"),
    ],
    'return f"{name} without a scale"': [
        (TOLD["no scale"], "continue"),
    ],
    "        if scale.numel() != 1:\n": [
        (TOLD["scales"], "        if False:\n"),
    ],
    "        if not is_fp8(x.dtype) and x.dtype not in WIDE:\n": [
        (TOLD["values"], "        if False:\n"),
        (CACHE_CODES, "        if x.dtype not in WIDE:\n"),
    ],
    "    if call.p_scale is None:\n": [
        (TOLD["probabilities"], "    if False:\n"),
    ],
    "    if call.softcap:\n": [
        (TOLD["soft cap"], "    if False:\n"),
    ],
    "    if call.sinks is not None:\n": [
        (TOLD["sinks"], "    if False:\n"),
        (TOLD["sinks"], "    if call.sinks is None:\n"),
    ],
    "    if call.mask is not None and call.mask.dtype not in (torch.bool, *WIDE):\n": [
        (TOLD["mask"], "    if False:\n"),
        (MASKS, "    if call.mask is not None and call.mask.dtype not in WIDE:\n"),
        (MASKS, "    if call.mask is not None and call.mask.dtype != torch.bool:\n"),
    ],
    "return None if _is_there() else": [
        (NO_OPERATOR, "return None if True else"),
    ],
    'offers("fp8_sdpa_recomp_fwd") and': [
        (NO_OPERATOR, ""),
    ],
    "q=codes_of(query, q_scale, ": [
        (GIVEN, "q=codes_of(query, k_scale, "),
        (GIVEN, "q=codes_of(query, q_scale.reciprocal(), "),
    ],
    "k=codes_of(call.key, k_scale, ": [
        (GIVEN, "k=codes_of(call.key, v_scale, "),
        (GIVEN, "k=codes_of(call.value, k_scale, "),
    ],
    "v=codes_of(call.value, v_scale, ": [
        (GIVEN, "v=codes_of(call.value, k_scale, "),
        (GIVEN, "v=codes_of(call.key, v_scale, "),
    ],
    "attn_mask=additive(call.mask, query.dtype, call.key.shape[2])": [
        (GIVEN, "attn_mask=None"),
        (MASKS, "attn_mask=call.mask"),
    ],
    "dropout_p=0.0": [
        (GIVEN, "dropout_p=0.1"),
    ],
    "is_causal=False": [
        (GIVEN, "is_causal=True"),
    ],
    "scale=call.scaling,": [
        (GIVEN, "scale=1.0 / call.scaling,"),
        (GIVEN, "scale=None,"),
    ],
    'softmax_mode="None"': [
        (GIVEN, 'softmax_mode="fast"'),
        (GIVEN, 'softmax_mode="fp32"'),
    ],
    "d_scale_q=q_scale,": [
        (GIVEN, "d_scale_q=q_scale.reciprocal(),"),
        (GIVEN, "d_scale_q=k_scale,"),
    ],
    "d_scale_k=k_scale,": [
        (GIVEN, "d_scale_k=k_scale.reciprocal(),"),
        (GIVEN, "d_scale_k=q_scale,"),
        (GIVEN, "d_scale_k=v_scale,"),
    ],
    "d_scale_v=v_scale,": [
        (GIVEN, "d_scale_v=v_scale.reciprocal(),"),
        (GIVEN, "d_scale_v=k_scale,"),
    ],
    "q_scale_s=inverse_of(p_scale),": [
        (GIVEN, "q_scale_s=p_scale,"),
    ],
    "q_scale_o=None if output_scale is None else inverse_of(output_scale),": [
        (GIVEN, "q_scale_o=None,"),
    ],
    "else inverse_of(output_scale),": [
        (GIVEN, "else output_scale,"),
    ],
    "d_scale_s=p_scale,": [
        (GIVEN, "d_scale_s=p_scale.reciprocal(),"),
        (GIVEN, "d_scale_s=v_scale,"),
    ],
    "is_amax_s=False": [
        (GIVEN, "is_amax_s=True"),
    ],
    "recompute=True": [
        (RECOMPUTE, "recompute=False"),
        (RECOMPUTE, "recompute=None"),
    ],
    "dequantize(out, output_scale, query.dtype)": [
        (GIVEN, "dequantize(out, output_scale.reciprocal(), query.dtype)"),
        (GIVEN, "dequantize(out, p_scale, query.dtype)"),
        (ATTENTION_FLOAT32, "dequantize(out, output_scale, torch.bfloat16)"),
    ],
    "out.transpose(1, 2).contiguous()": [
        (GIVEN, "out.transpose(1, 2)"),
        (GIVEN, "out.contiguous()"),
    ],
    "mask[(None,) * (4 - mask.ndim)][..., :positions]": [
        (MASKS, "mask[..., :positions]"),
        (MASKS, "mask[(None,) * (4 - mask.ndim)]"),
    ],
    "zeros.masked_fill(~mask,": [
        (MASKS, "zeros.masked_fill(mask,"),
    ],
    "torch.finfo(dtype).min)": [
        (MASKS, "torch.finfo(dtype).max)"),
        (MASKS, "-float('inf'))"),
    ],
}
