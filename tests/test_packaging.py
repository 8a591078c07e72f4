"""The package shares the `optimum` namespace with other distributions, and `optimum-cli` finds its commands."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.core
def test_optimum_cli_finds_fp8(tmp_path):
    script = "from optimum.commands.optimum_cli import main; main()"
    printed = fresh.TRANSFORMERS.run(script, "fp8", "--help", folder=tmp_path)
    assert "optimum-cli fp8" in " ".join(printed.split())


@pytest.mark.slow
def test_wheel_keeps_the_namespace_open(tmp_path):
    source = tmp_path / "source"
    leave = shutil.ignore_patterns(".*", "build", "*.egg-info", "hqt_output", "__pycache__")
    shutil.copytree(ROOT, source, ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True)

    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("optimum_fp8/**/*.py")}
    assert files <= names
    assert "optimum_fp8/ops/cpu/libfp8cpu.so" in names, "this machine has a compiler: the kernels must be in"
    assert wheel.filename is not None and "-py3-none-" in wheel.filename  # one wheel for every Python and every torch
    assert {name for name in names if name.startswith("optimum/")} == {"optimum/commands/register/register_fp8.py"}
