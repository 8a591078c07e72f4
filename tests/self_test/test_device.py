"""The device of the self-test: what is there is found, what is not is named with what was looked for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError
from optimum_fp8.self_test import device as devices
from optimum_fp8.self_test.device import available_device, device_names, synchronize, target_of


class Accelerator(ModuleType):
    """A stand-in for `torch.hpu`."""

    def __init__(self, count=2, name="GAUDI3"):
        super().__init__("torch.hpu")
        self.is_available, self.device_count = (lambda: count > 0), (lambda: count)
        self.get_device_name = lambda index=0: name
        self.waited = 0

    def synchronize(self):
        self.waited += 1


@pytest.fixture
def bridge(monkeypatch, tmp_path):
    """Makes a package `habana_frameworks` that can be imported; `torch.hpu` is what the test says."""

    def bridge(hpu, text=""):
        package = tmp_path / "habana_frameworks" / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("habana_frameworks", "habana_frameworks.torch"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        if hpu is not None:
            monkeypatch.setattr(torch, "hpu", hpu, raising=False)
        return hpu

    yield bridge
    for name in [name for name in sys.modules if name.partition(".")[0] == "habana_frameworks"]:
        del sys.modules[name]


def test_an_accelerator_is_found(bridge, monkeypatch):
    hpu = bridge(Accelerator())
    assert available_device() == available_device("hpu") == "hpu"
    assert target_of("hpu") == "gaudi3" and target_of("cpu") == "cpu"
    monkeypatch.setattr(torch, "get_device_module", lambda device: hpu)
    assert device_names("hpu") == ["GAUDI3", "GAUDI3"] and device_names("cpu") == []
    synchronize("hpu")
    synchronize("cpu")
    assert hpu.waited == 1


def test_an_unknown_device_is_an_error():
    with pytest.raises(FP8ConfigError, match="device 'hup' is unknown: did you mean 'hpu'"):
        available_device("hup")


@pytest.mark.parametrize(
    ("hpu", "text", "message"),
    [
        (None, "", "torch has no torch.hpu"),
        (None, "raise ImportError('libSynapse.so: not found')", "cannot be imported: libSynapse.so: not found"),
        (Accelerator(count=0), "", "torch.hpu finds no card"),
    ],
)
def test_what_was_looked_for_is_said(bridge, hpu, text, message):
    bridge(hpu, text)
    with pytest.raises(FP8NotAvailableError) as raised:
        available_device("hpu")
    assert message in str(raised.value) and "here is" in str(raised.value)


@pytest.mark.parametrize(("is_built", "message"), [(False, "built without CUDA"), (True, "torch.cuda finds no GPU")])
def test_no_gpu(monkeypatch, is_built, message):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: is_built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FP8NotAvailableError, match=message):
        available_device("cuda")


def test_without_a_bridge_no_gaudi(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(FP8NotAvailableError, match="looked for the package habana_frameworks"):
        available_device("hpu")
