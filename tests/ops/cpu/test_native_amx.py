"""The variant for AMX: built in wherever it can be compiled, and used only where processor and system allow it."""

import platform
import re
import subprocess
import sys
from pathlib import Path

from native_build import ROOT, names_of_setup

from optimum_fp8.ops.cpu import library

X86_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"
TILES = (1 << 22) | (1 << 24)  # of CPUID's EDX
STATES = 3 << 17  # of XCR0
KERNELS = ("linear", "grouped", "experts", "attention", "softmax")


def gcc_version():
    told = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True, check=True, timeout=60).stdout
    return int(re.match(r"\d+", told)[0])


def test_it_is_built_with_all_that_multiplies(monkeypatch):
    build = names_of_setup(monkeypatch)
    compiled = {source for source, variant, _ in build["sources_of_variants"](amx=True) if variant == "avx512amx"}
    assert compiled == {f"{kernel}.c" for kernel in KERNELS} == set(build["PRODUCTS"])
    if not X86_LINUX or gcc_version() < 11:
        return
    native = library.load()
    assert isinstance(native, library.Library) and "avx512amx" in {*native.variants, *native.too_new}
    symbols = subprocess.run(["nm", library.PATH], capture_output=True, text=True, check=True, timeout=60).stdout
    for kernel in KERNELS:
        assert f" fp8cpu_{kernel}_avx512amx\n" in symbols
    shown = ["objdump", "-d", "--no-show-raw-insn", library.PATH]
    assembly = subprocess.run(shown, capture_output=True, text=True, check=True, timeout=120).stdout
    users = [body for body in assembly.split("\n\n") if "tdpbf16ps" in body]
    assert len(users) >= 8  # both formats of linear layers, blocked and not, of keys, and of values


ANSWERS = [  # of the processor, of the system, and to the request; what comes of it, twice, and how many requests
    (TILES, STATES | 7, 0, "1 1 1"),
    (TILES, STATES | 7, -1, "0 0 1"),  # refused, as some containers do
    (TILES & ~(1 << 22), STATES | 7, 0, "0 0 0"),  # tiles, but none of bfloat16
    (TILES, 7, 0, "0 0 0"),  # the system does not keep their state
    (TILES, 1 << 17, 0, "0 0 0"),
    (0, STATES | 7, 0, "0 0 0"),
]


def test_permission_is_asked_for_once_and_may_be_refused(tmp_path):
    if not X86_LINUX:
        return
    source, driver = Path(__file__).with_name("native_amx.c"), tmp_path / "native_amx"
    headers = ROOT / "optimum_fp8/ops/cpu/native"
    subprocess.run(["gcc", "-Wall", "-Werror", f"-I{headers}", source, "-o", driver], check=True, timeout=120)
    for *told, expected in ANSWERS:
        words = [driver, *map(str, told)]
        found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
        assert found.strip() == expected, told
