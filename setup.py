"""Builds the native CPU kernels: one plain shared library, which any Python and any torch can load.

Where there is no C compiler that understands them (GCC 10 or newer, clang), the package is installed without them, and
runs its reference operators.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

NATIVE = Path("optimum_fp8/ops/cpu/native")
LIBRARY = NATIVE.with_name("libfp8cpu.so")
SOURCES = ["setup.py", *(str(path) for path in sorted(NATIVE.glob("*.[ch]")))]
FOR_ALL_VARIANTS = ["dispatch.c", "parallel.c"]
FOR_EACH_VARIANT = [
    "linear.c",
    "linear_gradient.c",
    "attention.c",
    "cast.c",
    "experts.c",
    "grouped.c",
    "histogram.c",
    "softmax.c",
]  # what takes longest to compile first
PRODUCTS = [
    "linear.c",
    "attention.c",
    "experts.c",
    "grouped.c",
    "softmax.c",
]  # what variants with tiles have of their own
FLAGS = [
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-fvisibility=hidden",
    "-fwrapv",
    "-g0",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_VARIANTS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512vbmi": [*AVX512, "-mavx512vbmi"],
    "avx512bf16": [*AVX512, "-mavx512vbmi", "-mavx512bf16"],
}
AMX = {"avx512amx": [*AVX512, "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"]}
PLAIN_TILES = {"tiles": ["-DFP8CPU_PLAIN_TILES"]}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def sources_of_variants(amx: bool) -> list[tuple[str, str, list[str]]]:
    """What to compile for each kind of processor: source, variant, flags; AMX's only where the compiler has it."""
    variants = {"portable": [], **(X86_VARIANTS if IS_X86 else {})}
    with_tiles = {**PLAIN_TILES, **(AMX if amx else {})}
    return [
        (source, variant, flags)
        for source in FOR_EACH_VARIANT
        for variant, flags in {**variants, **(with_tiles if source in PRODUCTS else {})}.items()
    ]


class BuildKernels(build_ext):
    """Compiles the kernels once for each kind of processor, and links all into one library."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python's tag: it belongs to none

    def run(self) -> None:
        """A library that stands beside its sources (in an editable install) is kept as long as it is the newest."""
        if not self.inplace or self.force or newer_group(SOURCES, str(LIBRARY)):
            super().run()

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise CompileError("the CPU kernels need GCC or clang")
        amx = self.understands(AMX["avx512amx"])
        macros = [("FP8CPU_X86", "1")] if IS_X86 else []
        macros += [("FP8CPU_AMX", "1")] if amx else []
        jobs = [
            (source, variant, [*macros, ("FP8CPU_VARIANT", variant)], flags)
            for source, variant, flags in sources_of_variants(amx)
        ]
        jobs += [(source, "all", macros, []) for source in FOR_ALL_VARIANTS]

        def compile_one(job: tuple[str, str, list[tuple[str, str]], list[str]]) -> list[str]:
            source, folder, defined, flags = job
            output = os.path.join(self.build_temp, folder)
            return self.compiler.compile(
                [str(NATIVE / source)], output_dir=output, macros=defined, extra_postargs=[*FLAGS, *flags]
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.compiler.link_shared_object(objects, target, libraries=[] if sys.platform == "win32" else ["m"])

    def understands(self, flags: list[str]) -> bool:
        """Whether AMX can be compiled here: from GCC 11 on, on Linux, whose interface the kernels know."""
        if not (IS_X86 and sys.platform.startswith("linux")):
            return False
        os.makedirs(self.build_temp, exist_ok=True)
        probe = Path(self.build_temp, "tiles.c")
        probe.write_text("#include <immintrin.h>\nvoid probe(void) { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); }\n")
        try:
            self.compiler.compile([str(probe)], extra_postargs=flags)
        except CompileError:
            return False
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python: the library knows neither Python nor torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            "optimum_fp8.ops.cpu.libfp8cpu",
            sources=[str(NATIVE / source) for source in FOR_ALL_VARIANTS + FOR_EACH_VARIANT],
            depends=SOURCES,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
