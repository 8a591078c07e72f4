"""What an issue report needs to know of the machine."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from optimum_fp8 import ops
from optimum_fp8.self_test import versions as facts
from optimum_fp8.self_test.versions import versions
from optimum_fp8.test_utils import gaudi


def test_software_and_processor_are_said():
    found = versions("cpu")
    assert found["torch"] == version("torch") == torch.__version__.split("+")[0] or torch.__version__
    assert found["transformers"] == version("transformers") and found["optimum-fp8"] == version("optimum-fp8")
    assert platform.python_version() in found["python"]
    assert f"{torch.get_num_threads()} threads" in found["processor"]
    assert found["CPU kernels"].split(", ") == ops.cpu.backends()
    assert "bridge" not in found and "driver" not in found and "cuda" not in found


def test_the_bridge_and_the_driver_are_said(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("1.24.0-abc\n")
    monkeypatch.setitem(facts._DRIVERS, "hpu", driver)
    monkeypatch.setattr(facts, "device_names", lambda device: ["GAUDI3"] * 8)
    with gaudi.emulated("gaudi3", bridge="1.24"):
        found = versions("hpu")
    assert found["bridge"] == "habana_frameworks 1.24" and found["driver"] == "1.24.0-abc"
    assert found["devices"] == "8 × GAUDI3"


def test_a_package_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(facts, "_PACKAGES", ("no-such-package",))
    assert versions("cpu")["no-such-package"] == "not installed"


def test_the_processor_without_a_list_of_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "Path", lambda name: tmp_path / "absent")
    assert facts._processor() == (platform.processor() or platform.machine())
