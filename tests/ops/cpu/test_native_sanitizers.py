"""The native sources under address and undefined-behaviour sanitizers, fuzzed by `native_fuzz.c`."""

import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_build import ROOT, names_of_setup

from optimum_fp8 import ops

# Without optimization all that is written down is executed, and checked; and it compiles ten times as fast.
SANITIZERS = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SECONDS = 20
COMPILERS = ["gcc", *filter(shutil.which, ["clang"])]  # gcc must be there: without it this fails
BESIDE_AMX = "avx512vbmi"  # which the code around tiles uses, where the processor has it


@pytest.fixture
def build(monkeypatch):
    return names_of_setup(monkeypatch)


def compile_all(compiler, build, folder, variants=None):
    """Every source for every variant, as setup.py has it but for -O and the sanitizers, and the driver; or for some
    variants that any processor runs, with flags of their own."""
    native = ROOT / build["NATIVE"]
    flags = [flag for flag in build["FLAGS"] if not flag.startswith(("-O", "-g"))] + [*SANITIZERS, f"-I{native}"]
    flags += ["-DFP8CPU_X86=1", "-DFP8CPU_AMX=1"] if build["IS_X86"] and variants is None else []
    jobs = [(native / source, source, []) for source in build["FOR_ALL_VARIANTS"]]
    jobs.append((Path(__file__).with_name("native_fuzz.c"), "driver", []))
    for source, variant, own in build["sources_of_variants"](amx=build["IS_X86"]):
        if variants is not None and variant not in variants:
            continue
        own = own if variants is None else variants[variant]
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
    fuzz(compile_all(compiler, build, tmp_path), SECONDS)


@pytest.mark.slow
def test_sanitizers_find_nothing_around_tiles(build, tmp_path):
    """Tiles in plain C, and all around them as the variant for AMX has it."""
    flags = build["X86_VARIANTS"][BESIDE_AMX] if f"cpu_{BESIDE_AMX}" in ops.cpu.backends() else []
    variants = {"portable": [], "tiles": [*build["PLAIN_TILES"]["tiles"], *flags]}
    fuzz(compile_all("gcc", build, tmp_path, variants), SECONDS // 2)


def fuzz(driver, seconds):
    seed = time.time_ns() % 2**40
    done = subprocess.run([driver, str(seconds), str(seed)], capture_output=True, text=True, timeout=20 * SECONDS)
    print(done.stdout)
    assert done.returncode == 0, f"first seed {seed}\n{done.stdout}\n{done.stderr}"
    assert ops.cpu.backends() and "last seed" in done.stdout
