"""The rule of conftest.py on skips, tried on a small test suite of its own."""

import re
import shutil
from pathlib import Path

import fresh
import pytest

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


PYTEST = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import pytest
raise SystemExit(pytest.main(["-v", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.fixture
def suite(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    return tmp_path


@pytest.mark.parametrize(
    ("workers", "outcome"),
    [([], r"::(?P<test>test_\w+) (?P<was>[A-Z]+)"), (["-n", "1"], r"\] (?P<was>[A-Z]+) .*::(?P<test>test_\w+)")],
    ids=["alone", "in a worker"],
)
def test_only_absent_hardware_may_skip(suite, workers, outcome):
    red = fresh.TORCH.try_to_run(PYTEST, "--continue-on-collection-errors", *workers, folder=suite)
    assert red.returncode == 1, red.stdout
    run, _, summary = red.stdout.partition("short test summary")
    assert {found["test"]: found["was"] for found in re.finditer(outcome, run)} == OUTCOMES
    assert "ERROR test_module.py - skip without absent hardware" in summary
    assert "skip without absent hardware" in run and "xfail without absent hardware" in run


def test_absent_hardware_alone_is_green(suite):
    green = fresh.TORCH.try_to_run(PYTEST, "test_suite.py", "-k", "runs or hardware", folder=suite)
    assert green.returncode == 0, green.stdout
