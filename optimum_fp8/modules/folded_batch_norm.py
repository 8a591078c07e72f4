"""Batch norms folded into the convolution before them: what is left in their place, and the way back.

In inference a batch norm multiplies each channel by a number and adds another. The convolution before it does both at
once, with other weights and a bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .base import shell_of
from .handler import Change
from .swap import swap


class Folded(nn.Identity):
    """What stands where a batch norm was; it does nothing, and has nothing that code which goes by names looks for.

    Attributes:
        conv: the convolution it was folded into, or what stands for that by now; no child.
        norm: the batch norm, without its tensors; no child either.
        moved_bias: whether the convolution had no bias before.
    """

    conv: Any
    norm: Any
    moved_bias: bool

    def __init__(self, conv: Any, norm: Any):
        super().__init__()
        shell = shell_of(norm)
        shell._buffers = dict.fromkeys(norm._buffers)
        self.__dict__.update(conv=conv, norm=shell, moved_bias=conv.bias is None)

    @torch.no_grad()
    def unfolded(self) -> nn.Module:
        """A batch norm that computes with the folded convolution, in high precision, what that computed alone.

        It scales by 1, and adds the bias where the convolution had none of its own, which loses it again.
        """
        norm, bias = shell_of(self.norm), self.conv.bias
        zeros, shift = torch.zeros_like(bias), bias.detach() if self.moved_bias else torch.zeros_like(bias)
        if norm.affine:
            norm._parameters = {"weight": nn.Parameter(torch.ones_like(bias)), "bias": nn.Parameter(shift)}
        norm._buffers = {
            "running_mean": zeros if norm.affine else -shift,
            "running_var": torch.full_like(zeros, 1 - norm.eps),
            "num_batches_tracked": torch.zeros((), dtype=torch.long, device=bias.device),
        }
        if self.moved_bias:
            self.conv._parameters["bias"] = None
        return norm


@dataclass
class Fold(Change):
    """A batch norm of a model that was folded; `owner` is the convolution, `before` are the parameters that it had."""

    model: nn.Module = field(default_factory=nn.Module)
    norm: nn.Module = field(default_factory=nn.Module)
    left: nn.Module = field(default_factory=nn.Module)

    def undo(self) -> None:
        super().undo()
        swap(self.model, {self.left: self.norm})


@torch.no_grad()
def fold(model: nn.Module, conv: Any, norm: Any) -> Fold:
    """Fold a batch norm in evaluation mode into the convolution before it; on meta, too. Computed in float32.

    Args:
        model: what both are in.
        conv: a convolution, transposed or not, whose output goes into `norm` and nowhere else.
        norm: a batch norm with running statistics.
    """
    before, left = conv._parameters, Folded(conv, norm)
    dtype, trained = conv.weight.dtype, conv.weight.requires_grad
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias, mean, variance, scale, shift = (
        None if each is None else each.detach().to(wide)
        for each in (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    fused = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift, conv.transposed)  # type: ignore[arg-type]
    made = (nn.Parameter(each.detach().to(dtype), requires_grad=trained) for each in fused)
    conv._parameters = {**before, **dict(zip(("weight", "bias"), made, strict=True))}
    swap(model, {norm: left})
    return Fold(conv, "_parameters", before, model, norm, left)


def unfold(model: nn.Module) -> None:
    """Put batch norms back into all the places where they were folded; the convolutions are in high precision."""
    folded = [module for module in model.modules() if isinstance(module, Folded)]
    swap(model, {module: module.unfolded() for module in folded})
