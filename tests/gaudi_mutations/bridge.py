"""Mistakes in `ops/hpu/bridge.py`, and the tests that fail with them."""

TWO_CARDS = "tests/ops/hpu/test_attention.py::test_without_a_scale_of_the_output"
CAST_TENSOR_E4M3_GAUDI3 = "tests/ops/hpu/test_casts.py::test_there_and_back[tensor-E4M3-gaudi3]"
CAST_TENSOR_E5M2_GAUDI2 = "tests/ops/hpu/test_casts.py::test_there_and_back[tensor-E5M2-gaudi2]"
NO_BRIDGE = "tests/ops/hpu/test_casts.py::test_without_a_bridge_it_cannot_be_forced"
LINEAR_INF = "tests/ops/hpu/test_linear.py::test_codes_that_the_card_reads_as_inf_are_an_error_and_no_fallback"
STATIC = "tests/ops/hpu/test_linear.py::test_a_static_layer_is_a_cast_and_a_product_without_bias"

FAILS: dict[str, list[tuple[str, str]]] = {
    "    found = getattr(packet, overload, None)\n": [
        (STATIC, '    found = getattr(packet, "default", None)\n'),
    ],
    "is not None\n\n\ndef why_missing": [
        (STATIC, "is None\n\n\ndef why_missing"),
    ],
    'offers("cast_to_fp8_v2")': [
        (NO_BRIDGE, "True"),
    ],
    "number_format(name, _target(gaudi_device())).full_scale": [
        (CAST_TENSOR_E4M3_GAUDI3, 'number_format(name, "gaudi2").full_scale'),
        (LINEAR_INF, 'number_format(name, "gaudi3").full_scale'),
        (CAST_TENSOR_E5M2_GAUDI2, 'number_format("E4M3", _target(gaudi_device())).full_scale'),
    ],
    "_target(gaudi_device())": [
        (TWO_CARDS, "_target(None)"),
    ],
}
