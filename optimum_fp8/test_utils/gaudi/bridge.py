"""A stand-in for `habana_frameworks`: the modules and functions that model files and start-up code use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn
from torch.fx.experimental.optimization import fuse

from .device import Device
from .fused_sdpa import fused_kernels

PACKAGE = "habana_frameworks"


class Startup:
    """The functions of `habana_frameworks.torch.core`: each is written down, and marks constants if it is to.

    As on the cards, none of them asks for the others, or whether anything has moved to the device.
    """

    def __init__(self, device: Device) -> None:
        self._device = device

    def mark_step(self, *args: Any, **kwargs: Any) -> None:
        self._device.events.append("mark_step")

    def set_env(self, name: str) -> Callable[..., nn.Module | None]:
        """A function that is called before anything moves to the device; it fuses batch norms into convolutions."""

        def hpu_set_env(model: nn.Module | None = None) -> nn.Module | None:
            self._device.events.append(name)
            return None if model is None else fuse(model)

        return hpu_set_env

    def initialize(self, name: str) -> Callable[..., None]:
        """A function that is called after the model moved to the device; it marks constants by their keys."""

        def of_1_19(
            model: nn.Module | None = None,
            mark_only_scales_as_const: bool = False,
            optimizer: Any = None,
            args: Any = None,
        ) -> None:
            self._mark(name, model, True, not mark_only_scales_as_const)

        def newer(
            model: nn.Module | None = None,
            mark_only_scales_as_const: bool = False,
            mark_scales: bool = True,
            mark_non_scales: bool = True,
            optimizer: Any = None,
            args: Any = None,
        ) -> None:
            scales = mark_scales or mark_only_scales_as_const
            self._mark(name, model, scales, mark_non_scales and not mark_only_scales_as_const)

        return of_1_19 if self._device.bridge == "1.19" else newer

    def _mark(self, name: str, model: nn.Module | None, scales: bool, others: bool) -> None:
        self._device.events.append(name)
        if model is None or not self._device.lazy:
            return
        for key, tensor in model.state_dict().items():
            if scales if "scale" in key else others:
                self._device.constants[key] = tensor

    def reset_env(self, name: str) -> Callable[[], None]:
        """A function that is called when inference is over."""

        def hpu_reset_env() -> None:
            self._device.events.append(name)

        return hpu_reset_env

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The names of the generation; those of the one before are kept."""
        newer = self._device.bridge != "1.19"
        set_env = ["hpu_set_env", "hpu_set_inference_env", *["hpu_inference_set_env"] * newer]
        reset_env = ["hpu_reset_env", "hpu_teardown_inference_env", *["hpu_inference_reset_env"] * newer]
        return {
            "mark_step": self.mark_step,
            **{name: self.set_env(name) for name in set_env},
            **{name: self.initialize(name) for name in ("hpu_initialize", "hpu_inference_initialize")},
            **{name: self.reset_env(name) for name in reset_env},
        }


def _hpu(device: Device) -> dict[str, Any]:
    """The functions of `habana_frameworks.torch.hpu`."""

    @contextmanager
    def sdp_kernel(enable_recompute: bool = False) -> Iterator[None]:
        before, device.recompute_sdp = device.recompute_sdp, enable_recompute
        try:
            yield
        finally:
            device.recompute_sdp = before

    def wrap_in_hpu_graph(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device.events.append("wrap_in_hpu_graph")
        return module

    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda index=None: device.chip.name,
        "synchronize": lambda index=None: None,
        "recompute_sdp_enabled": lambda: device.recompute_sdp,
        "sdp_kernel": sdp_kernel,
        "wrap_in_hpu_graph": wrap_in_hpu_graph,
        "enable_inference_mode": lambda: device.events.append("enable_inference_mode"),
        "disable_inference_mode": lambda: device.events.append("disable_inference_mode"),
    }


def _modules(device: Device) -> dict[str, dict[str, Any]]:
    """What each module has."""
    start = Startup(device).functions()
    return {
        PACKAGE: {"__version__": device.bridge},
        f"{PACKAGE}.torch": {"__version__": device.bridge},
        f"{PACKAGE}.torch.core": start,
        f"{PACKAGE}.torch.hpu": _hpu(device),
        f"{PACKAGE}.torch.hpex": {},
        f"{PACKAGE}.torch.hpex.kernels": fused_kernels(device),
    }


@contextmanager
def stand_in(device: Device) -> Iterator[None]:
    """Have the modules in `sys.modules` within a `with` block; afterwards none of the package."""
    try:
        for name, members in _modules(device).items():
            module = ModuleType(name, "Emulated on the CPU.")
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            module.__dict__.update(members)
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
