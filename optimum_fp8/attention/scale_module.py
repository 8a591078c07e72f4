"""AttentionScales: the scales of one attention module, as a small module inside it.

They are `model.layers.0.self_attn.fp8_scales.k_scale`, in memory and on disk, whatever attributes the attention module
has itself. They are buffers: no gradient, and a transformers model, which takes the dtype of its first parameter for
its own, never takes theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..scales import unsound

CHILD = "fp8_scales"


class AttentionScales(nn.Module):
    """Float32 scales by name, `(1,)` or `(heads, 1, 1)`: "q_scale", "k_scale", "v_scale", "p_scale", …

    A cast of the model leaves them alone, as it would round them; unsound ones are not loaded.
    """

    def __init__(self, scales: Mapping[str, torch.Tensor]):
        super().__init__()
        for name, scale in scales.items():
            self.register_buffer(name, scale.detach().float())

    def get(self, name: str) -> torch.Tensor | None:
        """The scale called `name`, None if there is none."""
        return self._buffers.get(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AttentionScales:
        for name, scale in self._buffers.items():
            assert scale is not None
            applied = fn(scale)
            self._buffers[name] = applied.float() if scale.is_meta else scale.to(applied.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        for name in self._buffers:
            scale = state_dict.get(f"{prefix}{name}")
            if scale is not None and scale.dtype != torch.float32:
                errors.append(f"{prefix}{name} is {scale.dtype}, expected torch.float32")
            if scale is not None and (wrong := unsound(scale)):
                errors.append(f"{prefix}{name} {wrong}")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


def set_scales(module: nn.Module, scales: Mapping[str, torch.Tensor]) -> None:
    """Give an attention module the named scales in place of those it had; none: take them off."""
    module._modules.pop(CHILD, None)
    if scales:
        module._modules[CHILD] = AttentionScales(scales)


def scales_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The scales that attention has on `module`, by name."""
    child = module._modules.get(CHILD)
    return {name: scale for name, scale in child._buffers.items() if scale is not None} if child is not None else {}


def scale_of(module: nn.Module, name: str) -> torch.Tensor | None:
    """One of the scales that attention has on `module`, None if there is none of that name."""
    child = module._modules.get(CHILD)
    return None if child is None else child._buffers.get(name)
