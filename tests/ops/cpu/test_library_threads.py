"""The native kernels and threads: results that do not depend on them, forks, one OpenMP runtime, no second copy."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from grids import over

from optimum_fp8 import ops

E4M3 = torch.float8_e4m3fn


def operands(rows, into=1000, out=300, dtype=torch.bfloat16):
    weight = (torch.randn(out, into) * 20).to(E4M3)
    return torch.randn(rows, into).to(dtype), weight, torch.rand(out, 1) * 0.01, torch.tensor([0.02]), torch.randn(out)


def results(backend, cases):
    with ops.backend(backend):
        found = [ops.linear(*case, full_scale=448.0) for case in cases]
        for x, weight, weight_scale, input_scale, _ in cases:
            found.append(ops.cast_to_fp8(x, input_scale, E4M3, 448.0).float())
            found.append(ops.cast_from_fp8(weight, weight_scale, torch.float32))
            found.append(ops.maxabs(x, group=-1))
            found.append(ops.maxabs(x))
    return found


def run_alone(code, timeout=240):
    """Run Python code in a process of its own; it fails by raising."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@over(backend=ops.cpu.backends())
def test_results_do_not_depend_on_the_number_of_threads(backend):
    cases = [operands(rows, dtype=dtype) for rows in (1, 6, 30) for dtype in (torch.bfloat16, torch.float32)]
    cases.append(operands(520, 200, 150))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(results(backend, cases))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@over(backend=ops.cpu.backends())
def test_calls_from_many_threads_at_once(backend):
    cases = [[operands(rows, 500 + rows, 200)] for rows in (1, 3, 8, 9, 40, 64)]
    expected = [results(backend, case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        jobs = [(pool.submit(results, backend, case), right) for case, right in zip(cases, expected, strict=True)]
        jobs += [(pool.submit(results, backend, cases[i % 6]), expected[i % 6]) for i in range(30)]
        for job, right in jobs:
            assert all(torch.equal(a, b) for a, b in zip(job.result(timeout=120), right, strict=True))


@over(backend=ops.cpu.backends())
def test_flushing_denormals_changes_nothing(backend):
    """The mode is the calling thread's alone: what depended on it would differ from thread to thread."""
    cases = [operands(rows) for rows in (1, 6, 30)]
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    tiny = (torch.randint(-120, 120, (5000,)) * 2.0**-12).to(torch.float16)

    def found():
        with ops.backend(backend):
            casts = [ops.cast_from_fp8(codes, torch.tensor([2.0**-12]), torch.float16).float().nan_to_num()]
            casts.append(ops.cast_to_fp8(tiny, torch.ones(1), E4M3, 448.0).float())
        return results(backend, cases) + casts

    expected = found()
    assert torch.set_flush_denormal(True)
    try:
        flushed = found()
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, flushed, strict=True))


FORK = """
import multiprocessing, os, torch
from optimum_fp8 import ops
torch.set_num_threads(2)
x, weight = torch.randn(30, 1000).bfloat16(), (torch.randn(300, 1000) * 20).to(torch.float8_e4m3fn)
scale, wide = torch.full((300, 1), 0.01), torch.randn(300, 1000)
def compute(_=None):
    results = []
    for backend in ops.cpu.backends():
        with ops.backend(backend):
            results.append(ops.linear(x, weight, scale, torch.tensor([0.02]), None, full_scale=448.0))
            results.append(ops.linear(x[:1], weight, scale, None, None, full_scale=448.0))
            results.append(ops.cast_to_fp8(wide, scale, torch.float8_e4m3fn, 448.0).view(torch.uint8))
    return [result.view(torch.uint8).numpy().tobytes() for result in results]
expected = compute()
from optimum_fp8.ops.cpu.library import threads
assert threads() == 2
child = os.fork()
if child == 0:
    os._exit(0 if threads() == 1 and compute() == expected else 1)
assert os.waitpid(child, 0)[1] == 0, "the child computed something else"
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(result == expected for result in pool.map(compute, range(4)))
assert compute() == expected and threads() == 2
"""


def test_forked_children_compute_on_one_thread():
    run_alone(FORK)


RUNTIMES = """
import re, torch
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"/lib[gi]?omp[^/]*[.]so", line)}
torch.ones(1 << 20).exp()
before = runtimes()
from optimum_fp8 import ops
from optimum_fp8.ops.cpu.library import load
x, weight = torch.randn(64, 1000), (torch.randn(900, 1000) * 20).to(torch.float8_e4m3fn)
for backend in ops.cpu.backends():
    with ops.backend(backend):
        ops.linear(x, weight, torch.ones(1), None, None, full_scale=448.0)
assert load().threaded
assert len(before) == 1 and runtimes() == before, (before, runtimes())
"""


def test_there_is_one_openmp_runtime_and_it_is_torchs():
    run_alone(RUNTIMES)


MEMORY = """
import gc, torch
from optimum_fp8 import ops
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
def stored():
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
SIZE = 48 << 20
weight = torch.randint(0, 120, (6144, 8192), dtype=torch.uint8).view(torch.float8_e4m3fn)
assert weight.numel() == SIZE
scale, small = torch.full((6144, 1), 0.001), weight[:64]
inputs = [torch.randn(rows, 8192).bfloat16() for rows in (1, 6, 20)]
for backend in ops.cpu.backends():
    with ops.backend(backend):
        for x in inputs:  # threads and scratch memory come to be
            ops.linear(x, small, scale[:64], torch.tensor([0.02]), None, full_scale=448.0)
        gc.collect()
        tensors, before = stored(), anonymous()
        for x in inputs:
            for _ in range(2):
                ops.linear(x, weight, scale, torch.tensor([0.02]), None, full_scale=448.0)
        gc.collect()
        assert stored() == tensors, (backend, tensors, stored())
        assert anonymous() - before < SIZE // 6, (backend, before, anonymous())
"""


@pytest.mark.slow
def test_there_is_no_second_copy_of_the_weights():
    run_alone(MEMORY)
