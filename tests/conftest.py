"""What holds for every test: one process a core, a fixed seed, no skip but for absent hardware, nothing deprecated."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import hypothesis
import pytest
import torch

PRESENT = {"cuda": torch.cuda.is_available(), "hpu": find_spec("habana_frameworks") is not None}

if "PYTEST_XDIST_WORKER" in os.environ:  # the other cores have workers of their own
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that a test starts
    torch.set_num_threads(1)
else:
    torch.set_num_threads(2)
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def scale_methods() -> Iterator[None]:
    """A scale method that a test registers is gone after it: others go through all that there are."""
    from optimum_fp8.scales import SCALE_METHODS

    before = dict(SCALE_METHODS)
    yield
    for name in SCALE_METHODS.keys() - before.keys():
        del SCALE_METHODS[name]


class DeprecationsRaise(logging.Handler):
    """Turns into an error what transformers logs of things that it will take away, where the package uses them."""

    SAID = re.compile(r"deprecat|will be removed|in (a )?future", re.IGNORECASE)
    LIBRARIES = {*sys.stdlib_module_names, "transformers", "torch", "accelerate", __name__.partition(".")[0]}
    APART_FROM = "optimum_fp8.calibration.decode"  # looks for the cache of an output by both of its names

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and self.SAID.search(record.getMessage()):
            user = self._user()
            if user.startswith("optimum_fp8") and user != self.APART_FROM:
                raise FutureWarning(f"{user}: {record.getMessage()}")

    def _user(self) -> str:
        """The module that called the library."""
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in self.LIBRARIES:
            frame = frame.f_back
        return frame.f_globals.get("__name__", "")


def pytest_configure(config: pytest.Config) -> None:
    logging.getLogger("transformers").addHandler(DeprecationsRaise())
    for category in ("FutureWarning", "DeprecationWarning"):  # what its decorators say
        config.addinivalue_line("filterwarnings", f"error::{category}:optimum_fp8.*")


def absent(item: pytest.Item) -> list[str]:
    """The devices that a test asks for by its markers and that this machine lacks."""
    return [device for device, present in PRESENT.items() if not present and item.get_closest_marker(device)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if devices := absent(item):
        pytest.skip(f"no {' and no '.join(devices)} device")


def turn_red(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A test that did not run must not look like one that passed: make a skip or an xfail a failure."""
    was = "xfail" if hasattr(report, "wasxfail") else "skip"
    reason = report.__dict__.pop("wasxfail", None) or (report.longrepr or [""])[-1]
    report.outcome = "failed"
    report.longrepr = f"{was} without absent hardware (only tests marked cuda or hpu may skip): {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if hasattr(report, "wasxfail") or (report.skipped and not absent(item)):
        turn_red(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    if report.skipped:
        turn_red(report)
    return report
