"""The native sources under address and undefined-behaviour sanitizers, fuzzed by `native_fuzz.c`."""

import runpy
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

from optimum_fp8 import ops

ROOT = Path(__file__).parents[3]
# Without optimization all that is written down is executed, and checked; and it compiles ten times as fast.
SANITIZERS = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SECONDS = 20
COMPILERS = ["gcc", *filter(shutil.which, ["clang"])]  # gcc must be there: without it this fails


@pytest.fixture
def build(monkeypatch):
    """The names that setup.py defines: which sources there are, and how each variant is compiled."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def compile_all(compiler, build, folder):
    """Every source for every variant, as setup.py has it but for -O and the sanitizers, and the driver."""
    native = ROOT / build["NATIVE"]
    flags = [flag for flag in build["FLAGS"] if not flag.startswith(("-O", "-g"))] + [*SANITIZERS, f"-I{native}"]
    flags += ["-DFP8CPU_X86=1", "-DFP8CPU_AMX=1"] if build["IS_X86"] else []
    jobs = [(native / source, source, []) for source in build["FOR_ALL_VARIANTS"]]
    jobs.append((Path(__file__).with_name("native_fuzz.c"), "driver", []))
    for source, variant, own in build["sources_of_variants"](amx=build["IS_X86"]):
        jobs.append((native / source, f"{variant}-{source}", [f"-DFP8CPU_VARIANT={variant}", *own]))

    def compile_one(job):
        source, name, own = job
        target = folder / f"{name}.o"
        command = [compiler, *flags, *own, "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    driver = folder / "native_fuzz"
    subprocess.run([compiler, *SANITIZERS, *objects, "-o", driver, "-lm", "-lpthread"], check=True, timeout=300)
    return driver


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_sanitizers_find_nothing(compiler, build, tmp_path):
    driver = compile_all(compiler, build, tmp_path)
    seed = time.time_ns() % 2**40
    done = subprocess.run([driver, str(SECONDS), str(seed)], capture_output=True, text=True, timeout=20 * SECONDS)
    print(done.stdout)
    assert done.returncode == 0, f"first seed {seed}\n{done.stdout}\n{done.stderr}"
    assert ops.cpu.backends() and "last seed" in done.stdout
