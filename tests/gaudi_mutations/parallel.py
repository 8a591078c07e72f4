"""Mistakes in `modules/parallel.py`, and the tests that fail with them."""

ALONE = "tests/modules/test_parallel.py::test_alone_they_compute_what_linear_layers_do[cpu-static-maxabs_hw-MLP]"
LIKE_ONE = "tests/modules/test_parallel.py::test_processes_compute_what_one_does"
NEW_TOKENS = "tests/modules/test_parallel.py::test_an_all_reduce_in_fp8_of_new_tokens"
TWO_PROCESSES = "tests/modules/test_parallel_on_gaudi.py::test_two_processes_on_an_emulated_gaudi[gaudi2]"

FAILS: dict[str, list[tuple[str, str]]] = {
    'PARTIAL, SUM = "output", "output2"': [
        (NEW_TOKENS, 'PARTIAL, SUM = "output2", "output"'),
    ],
    '{"partial_scale": PARTIAL, "output_scale": SUM}': [
        (NEW_TOKENS, '{"partial_scale": SUM, "output_scale": PARTIAL}'),
    ],
    "        x = self.own_part(self, input)\n": [
        (LIKE_ONE, "        x = input\n"),
    ],
    "return self.returned(self, self.product(x, bias))": [
        (ALONE, "return self.returned(self, self.product(x, None))"),
    ],
    "        output = self.product(x, None)\n": [
        (LIKE_ONE, "        output = self.product(x, bias)\n"),
    ],
    "if self.partial_scale is not None and self.output_scale is not None and _is_decoding(input):": [
        (TWO_PROCESSES, "if False:"),
    ],
    "(output, self.partial_scale, self.output_scale, ": [
        (NEW_TOKENS, "(output, self.output_scale, self.partial_scale, "),
    ],
    " and _is_decoding(input):": [
        (NEW_TOKENS, ":"),
        (TWO_PROCESSES, " and not _is_decoding(input):"),
    ],
    "            output = peers.all_reduce(output)\n        return self": [
        (LIKE_ONE, "            pass\n        return self"),
    ],
    "        return self.returned(self, _with_bias(output, bias))": [
        (NEW_TOKENS, "        return self.returned(self, output)"),
    ],
}
