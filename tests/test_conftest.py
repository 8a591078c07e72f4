"""The rule of conftest.py on skips, tried on a small test suite of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SUITE = """
import unittest
import pytest

def test_runs(): pass
@pytest.mark.cuda
def test_absent_hardware(): raise AssertionError
def test_skips(): pytest.skip("lazy")
@pytest.mark.skip(reason="lazy")
def test_marked_skip(): pass
def test_importorskip(): pytest.importorskip("no_such_module")
@pytest.mark.xfail(reason="known")
def test_xfails(): raise AssertionError
@pytest.mark.xfail(reason="known")
def test_xpasses(): pass
@pytest.fixture
def lazy(): pytest.skip("lazy")
def test_fixture_skips(lazy): pass
class TestCase(unittest.TestCase):
    def test_unittest_skips(self): self.skipTest("lazy")
"""
OUTCOMES = {
    "test_runs": "PASSED",
    "test_absent_hardware": "SKIPPED",
    "test_skips": "FAILED",
    "test_marked_skip": "ERROR",
    "test_importorskip": "FAILED",
    "test_xfails": "FAILED",
    "test_xpasses": "FAILED",
    "test_fixture_skips": "ERROR",
    "test_unittest_skips": "FAILED",
}


def run_pytest(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *args]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_only_absent_hardware_may_skip(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")

    green = run_pytest(tmp_path, "test_suite.py", "-k", "runs or hardware")
    assert green.returncode == 0, green.stdout

    red = run_pytest(tmp_path, "test_suite.py")
    assert red.returncode == 1, red.stdout
    assert dict(re.findall(r"::(test_\w+) ([A-Z]+)", red.stdout.split("short test summary")[0])) == OUTCOMES
    assert "skip without absent hardware" in red.stdout
    assert "xfail without absent hardware" in red.stdout

    module = run_pytest(tmp_path, "test_module.py")
    assert module.returncode != 0
    assert "skip without absent hardware" in module.stdout
