"""Attention on every variant of the native library, against the reference and against float64 arithmetic that rounds
where the reference says it does."""

from __future__ import annotations

import ctypes
import functools
import mmap
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy
import pytest
import torch
from grids import over, slow_but

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GRIDS = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BACKENDS = ops.cpu.backends()


def test_there_are_backends():
    assert "cpu_portable" in BACKENDS  # or nothing here would be tested


def remembered(compute):
    """What is expected of the last few cases: it takes longest, and is the same for every variant."""
    known = {}

    @functools.wraps(compute)
    def wrapped(case):
        key = tuple((name, contents(value)) for name, value in vars(case).items())
        if key not in known:
            if len(known) == 8:
                known.clear()
            known[key] = compute(case)
        return known[key]

    return wrapped


def contents(value):
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.contiguous().view(torch.uint8).numpy().tobytes()
    return str(value)


class Case:
    """One call: random operands, with the scales that are asked for."""

    def __init__(
        self,
        *,
        batch=1,
        heads=4,
        key_heads=2,
        queries=1,
        keys=65,
        dims=(64, 64),
        query_dtype=torch.float32,
        dtype=E4M3,
        scales="",
        per="tensor",
        scaling=0.2,
        softcap=0.0,
        dataflow="fused",
        mask=None,
        sinks=None,
    ):
        q, k, v = (
            torch.randn(batch, h, n, d).to(query_dtype)
            for h, n, d in ((heads, queries, dims[0]), (key_heads, keys, dims[0]), (key_heads, keys, dims[1]))
        )
        unit = 448.0 / LARGEST[dtype]

        def scale(x):
            shape = {"tensor": (1,), "head": (x.shape[1], 1, 1), "token": (*x.shape[:3], 1)}[per]
            return (torch.rand(shape) * 0.02 + 0.01) * unit

        self.k_scale, self.v_scale = scale(k), scale(v)
        self.q_scale = scale(q) if "q" in scales else None
        self.p_scale = torch.tensor([unit / 448]) if "p" in scales else None
        self.output_scale = torch.tensor([0.01 * unit]) if "o" in scales else None
        self.q, self.k, self.v = q, self.codes(k, self.k_scale, dtype), self.codes(v, self.v_scale, dtype)
        self.mask, self.sinks = mask, sinks
        self.options = {"scaling": scaling, "softcap": softcap, "dtype": dtype, "full_scale": LARGEST[dtype]}
        self.dataflow = dataflow

    @staticmethod
    def codes(x, scale, dtype):
        return (x.float() / scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)

    @remembered
    def reference(self):
        return self.run("reference")

    def run(self, backend):
        scales = (self.q_scale, self.k_scale, self.v_scale, self.p_scale, self.output_scale)
        with ops.backend(backend):
            return ops.attention(
                *(self.q, self.k, self.v, *scales, self.mask),
                **(self.options | {"sinks": self.sinks, "dataflow": self.dataflow}),
            )

    def grid(self, x, scale):
        if scale is None:
            return x
        scale, largest = scale.double().numpy(), self.options["full_scale"]
        return numpy.clip(x / scale, -largest, largest).astype(GRIDS[self.options["dtype"]]).astype(float) * scale

    @remembered
    def oracle(self):
        """ "fused", in float64; heads of keys are simply repeated."""
        groups = self.q.shape[1] // self.k.shape[1]
        k, v = (
            (x.double() * s.double()).repeat_interleave(groups, dim=1).numpy()
            for x, s in ((self.k, self.k_scale), (self.v, self.v_scale))
        )
        scores = self.grid(self.q.double().numpy(), self.q_scale) @ k.swapaxes(-1, -2) * self.options["scaling"]
        if cap := self.options["softcap"]:
            scores = numpy.tanh(scores / cap) * cap
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = numpy.where(self.mask.numpy(), scores, torch.finfo(torch.float32).min)
        elif self.mask is not None:
            scores = scores + self.mask.double().numpy()
        column = numpy.full((*scores.shape[:3], 1), -numpy.inf)
        if self.sinks is not None:
            column[...] = self.sinks.double().numpy().reshape(1, -1, 1, 1)
        scores = numpy.concatenate([scores, column], axis=-1)
        powers = numpy.exp(scores - scores.max(-1, keepdims=True))
        p = self.grid((powers / powers.sum(-1, keepdims=True))[..., :-1], self.p_scale)
        return self.grid((p @ v).swapaxes(1, 2), self.output_scale)


def assert_agrees(found, expected, tolerance=2e-6, edges=0.02):
    """All but the few values that a rounding on an edge moves agree to `tolerance`, those to an FP8 step."""
    found, expected = (numpy.asarray(x.double() if isinstance(x, torch.Tensor) else x) for x in (found, expected))
    assert found.shape == expected.shape and numpy.isfinite(found).all()
    error, size = numpy.abs(found - expected), numpy.abs(expected).max()
    assert numpy.quantile(error, 0.9) <= tolerance * size
    assert error.max() <= (edges if edges else tolerance) * size


@over(heads_and_key_heads=[(1, 1), (4, 4), (6, 2), (5, 1), (14, 2)], keys=[1, 63, 64, 65, 1000], backend=BACKENDS)
def test_groups_and_lengths(backend, heads_and_key_heads, keys):
    heads, key_heads = heads_and_key_heads
    case = Case(heads=heads, key_heads=key_heads, keys=keys, batch=2)
    assert_agrees(case.run(backend), case.oracle(), edges=None)


@over(
    dtype=[E4M3, E5M2],
    dims=[(1, 1), (16, 24), (33, 65), (80, 80), (128, 128), (192, 128), (256, 100)],
    backend=BACKENDS,
)
def test_head_sizes(backend, dims, dtype):
    case = Case(dims=dims, dtype=dtype, keys=70, scaling=dims[0] ** -0.5)
    assert_agrees(case.run(backend), case.oracle(), edges=None)


@over(queries=[1, 3, 17, 64], per=["tensor", "head", "token"], backend=BACKENDS)
def test_numbers_of_queries_and_scales(backend, queries, per):
    mask = torch.full((queries, 130), torch.finfo(torch.float32).min).triu(131 - queries).view(1, 1, queries, 130)
    case = Case(queries=queries, keys=130, per=per, batch=2, mask=mask)
    assert_agrees(case.run(backend), case.oracle(), edges=None)
    rounded = Case(queries=queries, keys=130, per=per, batch=2, mask=mask, scales="qpo")
    # An output that lies on an edge moves by a step, 1/16 of its value.
    assert_agrees(rounded.run(backend), rounded.oracle(), tolerance=1e-5, edges=0.07)


@over(dtype=[E4M3, E5M2], keys=[63, 1000], backend=BACKENDS)
def test_probabilities_are_rounded_with_their_final_sum(backend, keys, dtype):
    case = Case(keys=keys, heads=8, scales="p", dtype=dtype)
    unrounded = case.oracle()
    assert_agrees(case.run(backend), unrounded, tolerance=2e-3, edges=0.02)
    case.p_scale = None
    assert numpy.abs(case.oracle() - unrounded).max() > 4e-3 * numpy.abs(unrounded).max()  # the rounding matters


@over(dataflow=["fused", "unfused"], query_dtype=[torch.float32, torch.bfloat16, torch.float16], backend=BACKENDS)
def test_as_the_reference(backend, query_dtype, dataflow):
    mask = torch.randn(2, 4, 3, 99).to(query_dtype)
    sinks = torch.randn(4).to(query_dtype)
    case = Case(batch=2, queries=3, keys=99, query_dtype=query_dtype, dataflow=dataflow, mask=mask, sinks=sinks)
    case.options["softcap"] = 3.0
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[query_dtype]
    assert_agrees(case.run(backend), case.reference(), tolerance, None)
    unit = torch.tensor([1 / 448])
    case.q_scale, case.p_scale, case.output_scale = torch.tensor([0.01]), unit, torch.tensor([0.01])
    assert_agrees(case.run(backend), case.reference(), max(tolerance, 1e-3), 0.07)
    assert case.run(backend).dtype == query_dtype and case.run(backend).is_contiguous()


@over(backend=BACKENDS)
def test_unfused_rounds_scores_and_probabilities(backend):
    case = Case(queries=3, keys=200, heads=8, query_dtype=torch.bfloat16, dataflow="unfused", scaling=1.0)
    expected = case.reference()
    case.dataflow = "fused"
    other = case.reference()
    case.dataflow = "unfused"
    found = case.run(backend)
    assert (found.float() - expected.float()).norm() < 0.4 * (other.float() - expected.float()).norm()


@over(
    shape=[(1, 1, 3, 40), (2, 1, 3, 40), (2, 4, 3, 40), (1, 4, 1, 40), (3, 40), (1, 1, 3, 47)],
    dtype=[torch.float32, torch.bool],
    backend=BACKENDS,
)
def test_masks(backend, shape, dtype):
    mask = torch.randn(shape) * 3 if dtype == torch.float32 else torch.rand(shape) < 0.6
    case = Case(batch=2, queries=3, keys=40, mask=mask)
    found = case.run(backend)
    case.mask = mask[..., :40]
    assert_agrees(found, case.oracle(), edges=None)
    transposed = torch.empty(40, 3).copy_(torch.randn(40, 3)).t()
    case.mask = transposed
    assert_agrees(case.run(backend), case.oracle(), edges=None)


@over(backend=BACKENDS)
def test_sinks_and_softcap(backend):
    sinks = torch.randn(4)
    case = Case(queries=3, keys=50, batch=2, sinks=sinks, softcap=2.0, scaling=0.5)
    found = case.run(backend)
    assert_agrees(found, case.oracle(), edges=None)
    case.sinks = sinks.view(1, 4, 1, 1).expand(2, 4, 3, 1)
    assert torch.equal(case.run(backend), found)
    case.sinks = None
    assert numpy.abs(case.oracle() - found.double().numpy()).max() > 0.01


@over(mask_value=[torch.finfo(torch.float32).min, float("-inf"), False], backend=BACKENDS)
def test_rows_that_may_attend_to_nothing_are_as_in_the_reference(backend, mask_value):
    mask = torch.zeros(2, 33) if mask_value is not False else torch.ones(2, 33, dtype=torch.bool)
    mask[1] = mask_value
    for dataflow in ("fused", "unfused"):
        case = Case(queries=2, keys=33, mask=mask.view(1, 1, 2, 33), dataflow=dataflow)
        torch.testing.assert_close(case.run(backend), case.reference(), equal_nan=True, atol=2e-6, rtol=1e-5)


@over(dtype=[E4M3, E5M2], operand=["q", "k", "v"], scales=["", "qp"], backend=BACKENDS)
def test_nan_and_infinity_go_where_the_reference_sends_them(backend, operand, dtype, scales):
    for value in (float("nan"), float("inf")):
        case = Case(queries=2, keys=70, dims=(64, 64), dtype=dtype, scales=scales)
        getattr(case, operand)[0, 1, 1, 3] = value
        found, expected = case.run(backend), case.reference()
        assert torch.equal(found.isnan(), expected.isnan())
        both = ~expected.isnan()
        torch.testing.assert_close(found[both], expected[both], atol=2e-3, rtol=2e-3)


@over(dtype=[E4M3, E5M2], operand=["q", "k", "v"], scales=["", "qp"], backend=BACKENDS)
def test_nan_and_infinity_among_many_queries(backend, operand, dtype, scales):
    for value in (float("nan"), float("inf")):
        case = Case(queries=40, keys=70, dtype=dtype, scales=scales, query_dtype=torch.bfloat16)
        getattr(case, operand)[0, 1, 1, 3] = value
        found, expected = case.run(backend), case.reference()
        assert torch.equal(found.isnan(), expected.isnan())
        both = ~expected.isnan()
        torch.testing.assert_close(found[both], expected[both], atol=8e-3, rtol=8e-3)


@over(backend=BACKENDS)
def test_caches_may_be_views_of_larger_buffers(backend):
    case = Case(batch=2, keys=65, queries=2, dims=(48, 80), per="token")
    expected = case.run(backend)
    for name in "kv":
        codes = getattr(case, name)
        room = torch.full((2, 90, 4, codes.shape[3] + 16), 0x7F, dtype=torch.uint8)  # NaN, were it read
        room[:, 7:72, 1:3, 16:] = codes.view(torch.uint8).transpose(1, 2)
        setattr(case, name, room.view(E4M3)[:, 7:72, 1:3, 16:].transpose(1, 2))
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    case.k_scale = case.k_scale.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.run(backend), expected)


@over(per=["tensor", "head", "token"], backend=BACKENDS)
def test_keys_in_high_precision_are_rounded_with_their_scale(backend, per):
    case = Case(batch=2, keys=65, queries=3, query_dtype=torch.bfloat16, per=per, scales="q")
    case.k, case.v = torch.randn(2, 2, 65, 64).bfloat16(), torch.randn(2, 2, 65, 64).bfloat16()
    assert_agrees(case.run(backend), case.reference(), tolerance=8e-3, edges=None)


def at_the_end_of_memory(x):
    """A copy of x behind which lies a page that must not be touched."""
    size = x.numel() * x.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(address + room, mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=room - size).view(x.dtype).view(x.shape)
    return copy.copy_(x)


@over(keys_and_dims=[(1, (1, 3)), (65, (33, 65)), (66, (64, 128))], per=["head", "token"], backend=BACKENDS)
def test_nothing_behind_a_buffer_is_read(backend, keys_and_dims, per):
    keys, dims = keys_and_dims
    mask = torch.rand(1, 1, 2, keys) < 0.5
    case = Case(
        queries=2, keys=keys, dims=dims, per=per, scales="qpo", sinks=torch.randn(4), query_dtype=torch.bfloat16
    )
    for case.mask in (mask, mask.bfloat16(), mask.float()):
        expected = case.run(backend)
        plain = dict(vars(case))
        for name, value in plain.items():
            if isinstance(value, torch.Tensor):
                setattr(case, name, at_the_end_of_memory(value))
        assert torch.equal(case.run(backend), expected)
        vars(case).update(plain)


def test_what_is_not_built_is_refused_with_the_reason():
    case = Case(dataflow="qdq")
    with pytest.raises(FP8NotAvailableError, match="dataflow 'qdq'"):
        case.run(ops.cpu.backends()[0])
    case = Case()
    case.k, case.k_scale = torch.randn(1, 2, 65, 64), None
    with pytest.raises(FP8NotAvailableError, match="keys in torch.float32 without a scale"):
        case.run(ops.cpu.backends()[0])
    case = Case(query_dtype=torch.float64)
    with pytest.raises(FP8NotAvailableError, match=r"queries in torch\.float64"):
        case.run(ops.cpu.backends()[0])


def test_cpu_tensors_take_the_native_kernel():
    case, record = Case(), ops.CallRecord()
    operands = (case.q, case.k, case.v, None, case.k_scale, case.v_scale, None, None, None)
    ops.attention(*operands, **case.options, record=record)
    assert record.kernels == {("attention", ops.cpu.backends()[0]): 1}


@over(backend=BACKENDS)
def test_threads_do_not_change_the_result(backend):
    case = Case(heads=8, key_heads=1, keys=3000, scales="qp")
    found = case.run(backend)
    torch.set_num_threads(1)
    try:
        alone = case.run(backend)
    finally:
        torch.set_num_threads(2)
    assert_agrees(alone, found, tolerance=1e-3, edges=0.02)


@over(queries=[1, 20], backend=BACKENDS)
def test_calls_from_many_threads_at_once(backend, queries):
    cases = [Case(heads=8, key_heads=1, queries=queries, keys=65 + i, scales="q") for i in range(4)]
    expected = [case.run(backend) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(lambda case: case.run(backend), cases * 4), expected * 4, strict=True):
            assert_agrees(found, right, edges=None)


def causal(queries, keys, dtype=torch.float32):
    mask = torch.full((queries, keys), torch.finfo(torch.float32).min).triu(keys - queries + 1)
    return (mask == 0 if dtype == torch.bool else mask.to(dtype)).view(1, 1, queries, keys)


MASKS, SCALED = [torch.float32, torch.bfloat16, torch.bool], ["tensor", "head", "token"]


@over(dtype=MASKS, per=SCALED, backend=[backend for backend in BACKENDS if backend != "cpu_tiles"])
def test_blocks_of_many_queries(backend, per, dtype):
    check_blocks_of_many_queries(backend, per, dtype)


@pytest.mark.parametrize("per", slow_but(SCALED, "token"))
def test_blocks_of_many_queries_in_tiles(per):
    check_blocks_of_many_queries("cpu_tiles", per, torch.bool)


def check_blocks_of_many_queries(backend, per, dtype):
    mask = causal(300, 333, dtype).repeat(2, 1, 1, 1)
    mask[1, :, 40:, :30] = False if dtype == torch.bool else torch.finfo(dtype).min  # as padding is masked
    mask[1, :, 44, :] = mask[1, :, 40, 0]  # nothing to attend to
    case = Case(batch=2, heads=6, queries=300, keys=333, dims=(40, 24), per=per, mask=mask, scales="q")
    assert_agrees(case.run(backend), case.oracle(), tolerance=1e-5, edges=None)
    case.mask = causal(300, 333, dtype)
    assert_agrees(case.run(backend), case.oracle(), tolerance=1e-5, edges=None)
    case.mask, case.p_scale, case.output_scale = None, torch.tensor([1 / 448]), torch.tensor([0.01])
    assert_agrees(case.run(backend), case.reference(), tolerance=1e-2, edges=0.07)


@over(queries=[1, 20], per=["tensor", "head", "token"], backend=BACKENDS)
def test_one_position_to_attend_to(backend, queries, per):
    mask = torch.full((1, 1, queries, 70), float("-inf"))
    mask[..., 0] = 0
    case = Case(queries=queries, keys=70, per=per, mask=mask, batch=2)
    assert_agrees(case.run(backend), case.oracle(), edges=None)


@over(operand=["q", "k", "v", "k_scale", "v_scale"], backend=BACKENDS)
def test_masked_nan_reaches_what_it_reaches_in_the_reference(backend, operand):
    case = Case(queries=40, keys=40, mask=causal(40, 40), per="token")
    getattr(case, operand)[0, 1, 39, 0] = float("nan")
    found, expected = case.run(backend), case.reference()
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
    torch.testing.assert_close(found, expected, equal_nan=True, atol=2e-6, rtol=1e-4)


@over(query_dtype=[torch.float32, torch.bfloat16], backend=BACKENDS)
def test_nan_in_a_mask_reaches_what_it_reaches_in_the_reference(backend, query_dtype):
    count = 300  # more than a block, whose queries attend to none of the last positions
    case = Case(queries=count, keys=count, mask=causal(count, count), query_dtype=query_dtype)
    case.mask[0, 0, 3, count - 1] = float("nan")
    found, expected = case.run(backend), case.reference()
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()


@over(backend=BACKENDS)
def test_scores_beyond_the_least_of_a_mask(backend):
    case = Case(queries=20, keys=40, mask=causal(20, 40).clamp(min=-65504).half(), scaling=4e4)
    assert_agrees(case.run(backend), case.reference(), tolerance=1e-4, edges=None)


@over(
    full_scale=[(E4M3, 448.0), (E4M3, 240.0), (E5M2, 57344.0)],
    rows=["heads", "queries"],
    rounded=[False, True],
    backend=BACKENDS,
)
def test_every_code_of_keys_and_values(backend, rounded, rows, full_scale):
    """Row t attends to position t alone, whose value is code t; then to a key of zeros too, where each key is as large
    as any by a scale of its own: all rows come out alike."""
    dtype, largest = full_scale
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()]
    count = len(codes)
    case = Case(heads=count if rows == "heads" else 1, key_heads=1, queries=count if rows == "queries" else 1)
    case.q, case.options["dtype"], case.options["full_scale"] = case.q.bfloat16(), dtype, largest
    case.q_scale, case.p_scale = (torch.ones(1), torch.tensor([1 / largest])) if rounded else (None, None)
    case.k = torch.zeros(1, 1, count + 1, 64).to(dtype)
    case.v = torch.zeros(1, 1, count + 1, 64).to(dtype)
    case.v[0, 0, :count] = codes[:, None]
    case.k_scale = case.v_scale = torch.ones(1)
    alone = torch.eye(count, count + 1, dtype=torch.bool)
    case.mask = alone.view(1, -1, 1, count + 1) if rows == "heads" else alone.view(1, 1, -1, count + 1)
    found = case.run(backend).view(count, 64)
    torch.testing.assert_close(found.float(), codes.float()[:, None].expand_as(found), rtol=0, atol=0)
    case.q = torch.zeros_like(case.q)
    case.q[..., 7] = 2
    case.k[0, 0, :count, 7], case.v[0, 0, :count] = codes, 1
    sizes = torch.cat([codes.float().abs(), torch.zeros(1)])
    case.k_scale = torch.where(sizes > 0, 1 / sizes, 1.0).view(1, 1, -1, 1)
    case.options["scaling"] = 1.0
    case.mask = case.mask | (torch.arange(count + 1) == count)
    expected = torch.sigmoid(2 * codes.float().sign())[:, None].expand(count, 64)
    found = case.run(backend).view(count, 64).float()
    torch.testing.assert_close(found, expected, rtol=0.05 if rounded else 4e-3, atol=1e-3)
