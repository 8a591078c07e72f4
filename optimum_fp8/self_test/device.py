"""Which device the self-test runs on, and what was looked for where it is not there."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from ..errors import FP8ConfigError, FP8NotAvailableError, nearest
from ..formats import detect_target

DEVICES = ("hpu", "cuda", "cpu")
BRIDGE = "habana_frameworks"


def available_device(name: str | None = None) -> str:
    """The device called `name`, or the accelerator that is there, or the CPU.

    Raises:
        FP8ConfigError: an unknown name.
        FP8NotAvailableError: no such device; the message says what was looked for.
    """
    if name is None:
        return next(device for device in DEVICES if _why_absent(device) is None)
    if name not in DEVICES:
        raise FP8ConfigError(f"device {name!r} is unknown: {nearest(name, DEVICES)}")
    if (reason := _why_absent(name)) is not None:
        there = ", ".join(device for device in DEVICES if _why_absent(device) is None)
        raise FP8NotAvailableError(f"no device {name!r} here: {reason}; here is {there}")
    return name


def target_of(device: str) -> str:
    """The target whose number formats a device has."""
    return detect_target() if device == "hpu" else device


def device_names(device: str) -> list[str]:
    """What each of the devices calls itself; of the CPU: []."""
    if device == "cpu":
        return []
    module = torch.get_device_module(device)
    return [str(module.get_device_name(index)) for index in range(module.device_count())]


def synchronize(device: str) -> None:
    """Wait until a device has done all that it was asked to do."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def _why_absent(device: str) -> str | None:
    """What was looked for and not found; None if the device is there."""
    if device == "cpu":
        return None
    return _why_no_hpu() if device == "hpu" else _why_no_cuda()


def _why_no_hpu() -> str | None:
    if find_spec(BRIDGE) is None:
        return f"looked for the package {BRIDGE} (Gaudi's PyTorch bridge), which is not installed"
    try:
        import_module(f"{BRIDGE}.torch")  # makes torch.hpu
    except (ImportError, OSError, RuntimeError) as error:
        return f"{BRIDGE}.torch cannot be imported: {error}"
    hpu = getattr(torch, "hpu", None)
    if hpu is None:
        return f"{BRIDGE} is installed, and torch has no torch.hpu: its version is for another torch than this one"
    return None if hpu.is_available() else "torch.hpu finds no card: look whether hl-smi lists a free one"


def _why_no_cuda() -> str | None:
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA"
    return None if torch.cuda.is_available() else "torch.cuda finds no GPU: look whether nvidia-smi lists one"
