"""What holds for every test: one process a core, a fixed seed, and no skip but for absent hardware."""

import os
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
