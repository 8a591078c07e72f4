"""The rules of conftest.py on skips and on what is deprecated, tried on small test suites of their own."""

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_absent_hardware_alone_is_green(suite):
    green = fresh.TORCH.try_to_run(PYTEST, "test_suite.py", "-k", "runs or hardware", folder=suite)
    assert green.returncode == 0, green.stdout


DEPRECATED = """
import logging, warnings

LOGGED = "logging.getLogger('transformers.models').warning('`old` is deprecated. Use `new` instead.')"
LATER = "logging.getLogger('transformers').warning('`old` will be removed in v9.')"
WARNED = "warnings.warn('old', FutureWarning)"
OTHER = "logging.getLogger('transformers').warning('read this')"
THEIRS = "logging.getLogger('others').warning('`old` is deprecated')"

def run(code, module="optimum_fp8.hf"):
    exec(code, {"__name__": module, "logging": logging, "warnings": warnings})

def test_logged(): run(LOGGED)
def test_logged_in_transformers():
    inside = {"__name__": "transformers.models", "logging": logging}
    exec("exec(LOGGED, inside)", {"__name__": "optimum_fp8.hf", "LOGGED": LOGGED, "inside": inside})
def test_logged_for_later(): run(LATER)
def test_warned(): run(WARNED)
def test_other_logs(): run(OTHER)
def test_logged_by_others(): run(THEIRS)
def test_logged_for_a_test(): run(LOGGED, "test_something")
"""


@pytest.mark.slow
def test_what_transformers_calls_deprecated_is_an_error(suite):
    (suite / "test_suite.py").write_text(DEPRECATED)
    run = fresh.TORCH.try_to_run(PYTEST, "test_suite.py", folder=suite).stdout.partition("short test summary")[0]
    outcomes = {found[1]: found[2] for found in re.finditer(r"::(test_\w+) ([A-Z]+)", run)}
    assert outcomes == {
        "test_logged": "FAILED",
        "test_logged_in_transformers": "FAILED",
        "test_logged_for_later": "FAILED",
        "test_warned": "FAILED",
        "test_other_logs": "PASSED",
        "test_logged_by_others": "PASSED",
        "test_logged_for_a_test": "PASSED",
    }
