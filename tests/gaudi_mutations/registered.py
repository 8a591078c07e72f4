"""Mistakes in `ops/hpu/__init__.py`, and the tests that fail with them."""

PACKED = "tests/hf/test_quantizer_packed.py::test_memory_holds_one_copy_of_a_weight"
MIXTRAL = "tests/modules/test_gaudi_experts.py::test_the_whole_model_runs_on_gaudis_operator[GaudiMixtral]"
REFUSES_CODES_LARGER_FULL_SCALE = (
    "tests/ops/hpu/test_casts.py::test_codes_that_the_card_cannot_make_are_refused[larger full scale]"
)
REFUSES_VALUES_DTYPE = "tests/ops/hpu/test_casts.py::test_values_that_the_card_cannot_make_are_refused[dtype]"
CONV_REFUSED = "tests/ops/hpu/test_conv.py::test_three_dimensions_are_refused"
COMPILED = "tests/ops/hpu/test_experts.py::test_compilers_see_gaudis_operator"
EXPERTS_REFUSED = "tests/ops/hpu/test_experts.py::test_refuses_what_gaudi_does_not_compute[options0-gaudi-weight-only]"
NO_BLOCKS = "tests/ops/hpu/test_linear.py::test_an_older_bridge_takes_no_blocks"
MATMUL_REFUSED = "tests/ops/hpu/test_matmul.py::test_what_does_not_fit_is_refused"
BY_RANGE_INF = "tests/ops/hpu/test_ranges.py::test_casts_by_range_to_codes_that_the_card_reads_as_inf_are_an_error"
HISTOGRAM = "tests/ops/hpu/test_ranges.py::test_maxabs_and_histogram[0]"
MAXABS = "tests/ops/hpu/test_ranges.py::test_maxabs_and_histogram[-1]"

FAILS: dict[str, list[tuple[str, str]]] = {
    "(casts.cast_to, casts.refuses_cast_to)": [
        (REFUSES_CODES_LARGER_FULL_SCALE, "(casts.cast_to, takes_all)"),
    ],
    "(casts.cast_from, casts.refuses_cast_from)": [
        (REFUSES_VALUES_DTYPE, "(casts.cast_from, takes_all)"),
    ],
    "(ranges.cast_by_range, ranges.refuses_cast_by_range)": [
        (BY_RANGE_INF, "(ranges.cast_by_range, takes_all)"),
    ],
    "reference.maxabs(*call)": [
        (MAXABS, "reference.maxabs(call[0])"),
    ],
    "lambda call: reference.histogram(*call)": [
        (HISTOGRAM, "lambda call: reference.histogram(*call)[::-1]"),
    ],
    "(linear.run, linear.refuses)": [
        (NO_BLOCKS, "(linear.run, takes_all)"),
    ],
    "(matmul.run, matmul.refuses)": [
        (MATMUL_REFUSED, "(matmul.run, takes_all)"),
    ],
    "(conv.run, conv.refuses)": [
        (CONV_REFUSED, "(conv.run, takes_all)"),
    ],
    "(experts.experts, experts.refuses)": [
        (EXPERTS_REFUSED, "(experts.experts, takes_all)"),
    ],
    "constants=True": [
        (MIXTRAL, "constants=False"),
    ],
    "traced=True": [
        (COMPILED, "traced=False"),
    ],
    "matrix.t().contiguous().t()": [
        (PACKED, "matrix"),
        (PACKED, "matrix.t().contiguous()"),
    ],
}
