"""Without the native library, or with a wrong one: the reference computes, and the reason is told once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import optimum_fp8
from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.ops.cpu import library

WITHOUT = """
import json, logging, torch
warnings = []
class Keep(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
logging.getLogger("optimum_fp8.ops.dispatch").addHandler(Keep())
from optimum_fp8 import ops
x, weight = torch.randn(3, 40).bfloat16(), (torch.randn(6, 40) * 20).to(torch.float8_e4m3fn)
image, kernel = torch.randn(1, 2, 5, 5), (torch.randn(4, 2, 3, 3) * 20).to(torch.float8_e4m3fn)
one = torch.ones(1)
def compute():
    codes = ops.cast_to_fp8(x, one, torch.float8_e4m3fn, 448.0)
    return [
        ops.linear(x, weight, one, one, None, full_scale=448.0),
        ops.conv(image, kernel, one, one, None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
                   full_scale=448.0),
        ops.cast_from_fp8(codes, one, torch.float32), ops.maxabs(x), ops.maxabs(x, group=-1),
        ops.dynamic_scale(x, group=-1, divisor=448.0, rounding="pow2", fp8_config="E4M3", target="cpu",
                          hp_dtype=torch.bfloat16),
    ]
found = compute() and compute()
with ops.backend("reference"):
    assert all(torch.equal(a, b) for a, b in zip(found, compute(), strict=True))
print(json.dumps({"file": ops.__file__, "missing": ops.missing("cpu"), "avx2": ops.missing("cpu_avx2"),
                  "warnings": warnings, "backends": ops.backends(), "cpu": ops.cpu.backends()}))
"""


@pytest.fixture
def package_without_library(tmp_path):
    package = Path(optimum_fp8.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", library.PATH.name)
    shutil.copytree(package, tmp_path / "site" / package.name, ignore=ignored)
    return tmp_path / "site"


def run_with(site):
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    options = {"capture_output": True, "text": True, "timeout": 240, "cwd": site}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env={**os.environ, "PYTHONPATH": paths}, **options)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert Path(told["file"]).is_relative_to(site)
    return told


def assert_on_the_reference(told, reason):
    assert reason in told["missing"] and told["avx2"] == told["missing"]
    assert len(told["warnings"]) == 1 and told["missing"] in told["warnings"][0]
    assert told["backends"] == ["reference"] and told["cpu"] == []


def test_without_library(package_without_library):
    assert_on_the_reference(run_with(package_without_library), "were not built")


def test_a_file_that_is_no_library(package_without_library):
    (package_without_library / "optimum_fp8/ops/cpu" / library.PATH.name).write_text("no library")
    assert_on_the_reference(run_with(package_without_library), "cannot be loaded")


def compiled(folder, source):
    (folder / "other.c").write_text(source)
    built = folder / "other.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", built, folder / "other.c"], check=True, timeout=60)
    return built


FUNCTIONS = ("variant", "set_openmp", "read", "runs", "best", "encode", "decode", "linear")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("int fp8cpu_abi(void) { return 12345; }", "interface 12345"),
        ("int unrelated(void) { return 1; }", "fp8cpu_"),
    ],
)
def test_another_library(tmp_path, monkeypatch, source, reason):
    others = "".join(f"int fp8cpu_{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    built = compiled(tmp_path, source + (others if "12345" in source else ""))
    with pytest.raises((OSError, AttributeError), match=reason):
        library.Library(built)
    monkeypatch.setattr(library, "PATH", built)
    monkeypatch.setattr(library.Library.__init__, "__defaults__", (built,))
    told = library.load.__wrapped__()
    assert isinstance(told, str) and "cannot be loaded" in told and reason in told


def test_statuses_become_errors():
    library.check(0, "linear")
    with pytest.raises(MemoryError, match="linear: no memory"):
        library.check(1, "linear")
    with pytest.raises(RuntimeError, match="answered 2"):
        library.check(2, "linear")


def test_each_variant_runs_or_says_why_not():
    found = library.load()
    assert isinstance(found, library.Library) and "portable" in found.variants
    assert {*found.variants, *found.too_new} <= set(library.VARIANTS)
    for name in found.variants:
        with ops.backend(f"cpu_{name}"):
            assert ops.maxabs(torch.tensor([[-2.0, 1.0]])) == 2
    for name in found.too_new:
        message = f"'cpu_{name}' cannot run: this processor has not all of the instructions"
        with pytest.raises(FP8NotAvailableError, match=message), ops.backend(f"cpu_{name}"):
            pass


def test_torchs_runtime_is_found():
    found = library.load()
    assert isinstance(found, library.Library) and found.threaded
    assert library.threads() == torch.get_num_threads()
