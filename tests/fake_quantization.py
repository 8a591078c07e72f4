"""FP8 quantization of a model by hooks, with nothing of the package: about as exact as a model in FP8 should be."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

FULL_SCALE = 448.0


def rounded(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """`x` on the grid of float8_e4m3fn whose largest value is `largest`."""
    scale = largest.float().clamp(min=1e-12) / FULL_SCALE
    codes = (x.float() / scale).clamp(-FULL_SCALE, FULL_SCALE).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


class FakeAttention(TorchFunctionMode):
    """scaled_dot_product_attention with each operand, and the softmax, rounded to its own range."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attention(*args, **(kwargs or {}))

    @staticmethod
    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None and not is_causal and not enable_gqa
        query, key, value = (rounded(x, x.abs().max()) for x in (query, key, value))
        scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        return (rounded(scores.softmax(-1), torch.ones(())) @ value.float()).to(query.dtype)


@torch.no_grad()
def fake_quantized(model: nn.Module, names: Collection[str], run: Callable[[nn.Module], Any]) -> nn.Module:
    """The model with the weights and inputs of some layers rounded, inputs by the ranges of `run`."""
    ranges: dict[str, torch.Tensor] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            ranges[name] = torch.maximum(ranges.get(name, torch.zeros(())), args[0].detach().abs().max().float())

        return hook

    layers = {name: model.get_submodule(name) for name in names}
    hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    run(model)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        layer.weight.copy_(rounded(layer.weight, layer.weight.abs().max()))
        layer.register_forward_pre_hook(lambda module, args, name=name: (rounded(args[0], ranges[name]), *args[1:]))
    return model
