"""What tells a model, and data, from others, so that measurements are never applied to another model unnoticed.

The fingerprint hashes an evenly spaced sample of each parameter, rounded to bfloat16: cheap on any size, and the same
whether the checkpoint was loaded as bfloat16 or float32. What has no parameters is told by its class.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import nn

_SAMPLES = 4096
_DIGITS = 32  # of the fingerprint of data


def weight_digest(weight: torch.Tensor) -> str:
    """16 hex digits for one high-precision weight of any shape (as the original module stores it)."""
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    weight = whole(weight)
    if weight.device.type == "meta":  # offloaded: its values are elsewhere
        return digest.hexdigest()[:16]
    flat = weight.detach().reshape(-1)
    # A copy: FSDP frees the storage of its weights, and cannot where NumPy has seen it.
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16, copy=True).cpu().contiguous()
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def whole(weight: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process has a shard; all of them have to ask for it at once. Others as they are."""
    gather = getattr(weight, "full_tensor", None)  # a DTensor's
    return weight if gather is None else gather()


def model_fingerprint(model: nn.Module, known: Mapping[str, str] | None = None) -> str:
    """32 hex digits for a model in high precision.

    Args:
        model: its parameters in FP8, and their scales, are left out: only the originals tell.
        known: digests by parameter name of weights that were in high precision before they became FP8.
    """
    digests = dict(known or {})
    in_fp8 = {name.rpartition(".")[0] for name in digests}
    for name, parameter in model.named_parameters():
        is_scale = name.endswith("_scale") and name.rpartition(".")[0] in in_fp8
        if name not in digests and not is_scale and parameter.numel():
            digests[name] = weight_digest(parameter)
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def architecture(model: nn.Module) -> dict[str, str]:
    """The classes of modules that hold nothing (activation functions, pools), by name: no fingerprint tells them."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name and not module._modules and not module._parameters and not module._buffers
    }


def difference(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Where two architectures differ, of the modules that both have; None if they agree.

    Modules that only one has do not count: models written for a device have some of their own.
    """
    for name, kind in one.items():
        if other.get(name, kind) != kind:
            return f"{name} is {kind}, not {other[name]}"
    return None


def added_data(one: str, other: str) -> str:
    """The fingerprint of two parts of the data together; "" is that of unknown data, and adds nothing."""
    if not one or not other:
        return one or other
    total = (_as_number(one) + _as_number(other)) % (1 << 4 * _DIGITS)
    return f"{total:0{_DIGITS}x}"


def _as_number(data: str) -> int:
    """A fingerprint as a number; what older versions wrote of several runs is any other text."""
    known = data if re.fullmatch(r"[0-9a-f]{32}", data) else hashlib.sha256(data.encode()).hexdigest()[:_DIGITS]
    return int(known, 16)
