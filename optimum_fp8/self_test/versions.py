"""What an issue report has to say of the machine: versions, devices, drivers, kernels."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import torch

from .. import ops
from .device import BRIDGE, device_names

_PACKAGES = ("optimum-fp8", "torch", "transformers", "accelerate", "optimum")
_DRIVERS = {"hpu": Path("/sys/module/habanalabs/version"), "cuda": Path("/sys/module/nvidia/version")}

_OPERATORS = (
    *("cast_to_fp8_v2", "cast_from_fp8", "fp8_gemm_v2", "conv2d_fp8", "softmax_fp8", "sum_fp8", "fp8_sdpa_fwd"),
    *("fp8_sdpa_recomp_fwd", "mixture_of_experts", "calculate_scale_for_cast", "cast_to_fp8_just_in_time"),
)

_OPERATORS = (
    *("cast_to_fp8_v2", "cast_from_fp8", "fp8_gemm_v2", "conv2d_fp8", "softmax_fp8", "sum_fp8", "fp8_sdpa_fwd"),
    *("fp8_sdpa_recomp_fwd", "mixture_of_experts", "calculate_scale_for_cast", "cast_to_fp8_just_in_time"),
)


def versions(device: str) -> dict[str, str]:
    """Each fact by its label, what is not there left out."""
    return dict(_facts(device))


def _facts(device: str) -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        yield package, _version(package)
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "processor", f"{_processor()}, {torch.get_num_threads()} threads"
    yield "CPU kernels", ", ".join(ops.cpu.backends()) or f"none: {ops.missing('cpu')}"
    if device == "cuda":
        yield "cuda", str(torch.version.cuda)
    yield from _bridge()
    if names := device_names(device):
        yield "devices", f"{len(names)} × {', '.join(dict.fromkeys(names))}"
    driver = _DRIVERS.get(device)
    if driver is not None and driver.exists():
        yield "driver", driver.read_text().strip()


def _bridge() -> Iterator[tuple[str, str]]:
    """Gaudi's software: the packages of a release carry its version."""
    releases = {str(each.name): each.version for each in distributions() if "habana" in str(each.name).lower()}
    try:
        release = getattr(import_module(f"{BRIDGE}.torch"), "__version__", None)
    except (ImportError, OSError, RuntimeError):
        release = None
    if release is not None:
        releases.setdefault(BRIDGE, str(release))
    if releases:
        yield "bridge", ", ".join(f"{name} {found}" for name, found in sorted(releases.items()))
        there = {name: getattr(torch.ops.hpu, name, None) for name in _OPERATORS}
        offered = [f"{name} ({', '.join(found.overloads())})" for name, found in there.items() if found is not None]
        yield "torch.ops.hpu", ", ".join(offered) or "none of Gaudi's FP8 operators"
        if lacking := [name for name, found in there.items() if found is None and offered]:
            yield "lacking", ", ".join(lacking)
        there = {name: getattr(torch.ops.hpu, name, None) for name in _OPERATORS}
        offered = [f"{name} ({', '.join(found.overloads())})" for name, found in there.items() if found is not None]
        yield "torch.ops.hpu", ", ".join(offered) or "none of Gaudi's FP8 operators"
        if lacking := [name for name, found in there.items() if found is None and offered]:
            yield "lacking", ", ".join(lacking)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
