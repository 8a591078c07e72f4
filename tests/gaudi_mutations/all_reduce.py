"""Mistakes in `modules/all_reduce.py`, and the tests that fail with them."""

ALL_REDUCE = "tests/modules/test_all_reduce.py::test_a_sum_in_fp8_is_within_its_bound_and_the_same_everywhere[2]"

FAILS: dict[str, list[tuple[str, str]]] = {
    "dist.all_reduce(x, group=self.group)": [
        (ALL_REDUCE, "dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)"),
    ],
    "torch.cat(parts, dim=-1)": [
        (ALL_REDUCE, "torch.cat(parts, dim=0)"),
    ],
    "    if (found := dist.get_world_size(self.group)) != self.count:": [
        (ALL_REDUCE, "    if (found := 0) != 0:"),
    ],
    "ops.cast_to_fp8(padded, partial_scale,": [
        (ALL_REDUCE, "ops.cast_to_fp8(padded, sum_scale,"),
        (ALL_REDUCE, "ops.cast_to_fp8(padded, partial_scale.reciprocal(),"),
    ],
    "received.view(fmt.dtype), partial_scale, torch.float32)": [
        (ALL_REDUCE, "received.view(fmt.dtype), sum_scale, torch.float32)"),
        (ALL_REDUCE, "received.view(fmt.dtype), partial_scale.reciprocal(), torch.float32)"),
    ],
    "partial.reshape(self.count, share).sum(dim=0)": [
        (ALL_REDUCE, "partial.reshape(share, self.count).sum(dim=1)"),
    ],
    ".sum(dim=0)": [
        (ALL_REDUCE, ".amax(dim=0)"),
    ],
    "ops.cast_to_fp8(total, sum_scale,": [
        (ALL_REDUCE, "ops.cast_to_fp8(total, partial_scale,"),
        (ALL_REDUCE, "ops.cast_to_fp8(total, sum_scale.reciprocal(),"),
    ],
    "received.view(fmt.dtype), sum_scale, x.dtype)": [
        (ALL_REDUCE, "received.view(fmt.dtype), partial_scale, x.dtype)"),
        (ALL_REDUCE, "received.view(fmt.dtype), sum_scale.reciprocal(), x.dtype)"),
        (ALL_REDUCE, "received.view(fmt.dtype), sum_scale, torch.float32)"),
    ],
}
