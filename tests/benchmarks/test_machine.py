"""The machine is described from what the system tells, and copies are counted against its last cache."""

from __future__ import annotations

import pytest
import torch

from benchmarks import machine
from optimum_fp8 import ops

CPUINFO = """processor\t: 0
cpu family\t: 6
model\t\t: 207
model name\t: Some Processor
flags\t\t: fpu avx2 avx512f amx_tile

processor\t: 1
cpu family\t: 6
model\t\t: 207
model name\t: Some Processor
flags\t\t: fpu avx2 avx512f amx_tile
"""


@pytest.fixture
def sysfs(tmp_path):
    """Two caches of level 1, of which one is for instructions, and one of level 3."""
    caches = [("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 3, "260M")]
    for index, (kind, level, size) in enumerate(caches):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    return tmp_path


@pytest.mark.parametrize("level, size", [(1, 48 * 1024), (2, 0), (3, 260 * machine.MIB)])
def test_cache_bytes(sysfs, level, size):
    assert machine.cache_bytes(level, sysfs) == size


def test_describe():
    described = machine.describe(CPUINFO)
    assert described["processor"] == "Some Processor (family 6, model 207)"
    assert described["instructions"] == "avx2, avx512f, amx_tile"
    assert described["cores"] == f"2, {torch.get_num_threads()} threads used"
    assert torch.__version__ in described["torch"]


@pytest.mark.parametrize(
    "nbytes, limit, copies",
    [
        (10, 1000, 21),  # more than twice a cache of 100 bytes
        (10, 150, 15),  # as many as the limit allows
        (100, 150, 2),  # but never one alone, which would stay in the cache
    ],
)
def test_cold_copies(monkeypatch, nbytes, limit, copies):
    monkeypatch.setattr(machine, "cache_bytes", lambda level: 100 * machine.MIB if level == 3 else 0)
    assert machine.cold_copies(nbytes * machine.MIB, limit * machine.MIB) == copies


@pytest.mark.parametrize("backends, name", [(["cpu_avx2"], "native loop"), ([], "torch's sum")])
def test_reader_is_native_where_that_was_built(monkeypatch, backends, name):
    read_natively: list[torch.Tensor] = []
    monkeypatch.setattr(ops.cpu, "backends", lambda: backends)
    monkeypatch.setattr(ops.cpu, "read_memory", read_natively.append)
    read, said = machine.reader()
    read(torch.ones(64, 8).to(torch.float8_e4m3fn))
    assert name in said
    assert len(read_natively) == len(backends)


def test_gemm_peak_counts_two_operations_an_element(monkeypatch):
    monkeypatch.setattr(machine.timing, "interleave", lambda sides, **options: {"bf16": [0.5, 0.25], "fp32": [0.8, 1]})
    peak = machine.gemm_peak(size=10)
    assert (peak.bf16, peak.fp32) == (2 * 10**3 / 0.25, 2 * 10**3 / 0.8)
    assert peak.best == peak.bf16
    assert machine.GemmPeak(1.0, 2.0).best == 2.0


def test_gemm_peak_takes_smaller_matrices_in_a_dtype_whose_product_is_slow(monkeypatch):
    def interleave(products, **options):
        assert [len(product()) for product in products.values()] == [512, 1024]
        return {"bf16": [0.5], "fp32": [0.25]}

    slow = {(torch.bfloat16, 256): 0.1, (torch.bfloat16, 512): 0.8}
    monkeypatch.setattr(machine.timing, "seconds", lambda run: slow.get((run.args[0].dtype, len(run.args[0])), 0.0))
    monkeypatch.setattr(machine.timing, "interleave", interleave)
    assert machine.gemm_peak(budget=1.5, size=1024) == machine.GemmPeak(2 * 512**3 / 0.5, 2 * 1024**3 / 0.25)
