"""Mistakes in `ops/hpu/ranges.py`, and the tests that fail with them."""

BOUNDED = "tests/ops/hpu/test_ranges.py::test_scales_of_extreme_ranges_are_bounded"
BY_RANGE = "tests/ops/hpu/test_ranges.py::test_casts_by_range[gaudi2]"
BY_RANGE_INF = "tests/ops/hpu/test_ranges.py::test_casts_by_range_to_codes_that_the_card_reads_as_inf_are_an_error"
CALCULATED = "tests/ops/hpu/test_ranges.py::test_the_bridge_calculates_per_tensor_scales_where_it_can"
COMPOSED = "tests/ops/hpu/test_ranges.py::test_an_older_bridge_composes_them"
DYNAMIC = "tests/ops/hpu/test_ranges.py::test_dynamic_scales_of_gaudis_targets[gaudi2]"
NOT_FINITE = "tests/ops/hpu/test_ranges.py::test_values_that_are_not_finite_do_not_count"

FAILS: dict[str, list[tuple[str, str]]] = {
    "_PER_TENSOR = 1": [
        (CALCULATED, "_PER_TENSOR = 2"),
        (CALCULATED, "_PER_TENSOR = 0"),
    ],
    '{"identity": 0, "pow2": 1}': [
        (CALCULATED, '{"identity": 1, "pow2": 0}'),
    ],
    "    if not _is_calculated(call):": [
        (CALCULATED, "    if True:"),
    ],
    "reference.maxabs(x.where(x.isfinite(), 0), call.group)": [
        (NOT_FINITE, "reference.maxabs(x, call.group)"),
    ],
    "call.group).to(call.hp_dtype)": [
        (DYNAMIC, "call.group)"),
    ],
    "ranges, _PER_TENSOR, _SCALE_MODES[call.rounding], fullscale": [
        (CALCULATED, "ranges, _SCALE_MODES[call.rounding], _PER_TENSOR, fullscale"),
        (NOT_FINITE, "x, _PER_TENSOR, _SCALE_MODES[call.rounding], fullscale"),
    ],
    "_SCALE_MODES[call.rounding], fullscale": [
        (CALCULATED, "1, fullscale"),
    ],
    "fullscale=call.divisor, backoff=1.0": [
        (CALCULATED, "fullscale=1.0 / call.divisor, backoff=1.0"),
        (CALCULATED, "fullscale=1.0, backoff=call.divisor"),
        (CALCULATED, "fullscale=call.divisor, backoff=0.5"),
    ],
    "scale.float().clamp(2.0**MIN_EXPONENT, 2.0**MAX_EXPONENT)": [
        (DYNAMIC, "scale.clamp(2.0**MIN_EXPONENT, 2.0**MAX_EXPONENT)"),
        (BOUNDED, "scale.float()"),
        (BOUNDED, "scale.float().clamp(2.0**MIN_EXPONENT)"),
        (BOUNDED, "scale.float().clamp(max=2.0**MAX_EXPONENT)"),
    ],
    "torch.where(ranges == 0, torch.ones_like(scale), scale)": [
        (DYNAMIC, "scale"),
        (DYNAMIC, "torch.where(ranges == 0, scale, torch.ones_like(scale))"),
    ],
    "call.group == 0 and": [
        (CALCULATED, "True and"),
    ],
    " and call.target in GAUDI_TARGETS": [
        (CALCULATED, ""),
    ],
    " and call.hp_dtype in WIDE": [
        (DYNAMIC, ""),
    ],
    "call.rounding in _SCALE_MODES and": [
        (NOT_FINITE, "True and"),
    ],
    ' and offers("calculate_scale_for_cast")': [
        (COMPOSED, ""),
    ],
    "    return refuses_full_scale(call.x, call.dtype, call.full_scale)": [
        (BY_RANGE_INF, "    return None"),
    ],
    "call.scale_of_range, call.per_row)": [
        (BY_RANGE, "call.scale_of_range, not call.per_row)"),
    ],
    "quantize(call.x.contiguous(), scale, call.dtype, call.full_scale), scale, found": [
        (BY_RANGE, "quantize(call.x.contiguous(), scale.reciprocal(), call.dtype, call.full_scale), scale, found"),
        (BY_RANGE, "quantize(call.x.contiguous(), scale, call.dtype, call.full_scale), found, scale"),
        (BY_RANGE, "quantize(call.x.contiguous(), scale, torch.float8_e5m2, 57344.0), scale, found"),
    ],
}
