"""Fine-tuning a converted model as it is would train what is not in FP8, and nothing else: that is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import FP8StateError
from ..formats import is_fp8
from ..modules import fp8_modules
from ..modules.handler import Change

_HANDLE = "_fp8_refuses_full_training"


class _Hook(Change):
    """The hook on a model; undone, it is gone."""

    def undo(self) -> None:
        handle = self.owner.__dict__.pop(self.attribute, None)
        if handle is not None:
            handle.remove()


def guard_training(model: nn.Module) -> list[Change]:
    """Have a converted model of transformers refuse the backward pass of a full fine-tuning.

    Parameters in FP8 have no gradient. Where every other one is to be trained nobody has chosen: no adapter was added,
    nothing was frozen. The step would train norms, biases and embeddings alone, without a word.

    Returns:
        what was changed.
    """
    if not isinstance(model, transformers.PreTrainedModel) or _HANDLE in model.__dict__:
        return []
    model.__dict__[_HANDLE] = model.register_forward_hook(_watch_backward)
    return [_Hook(model, _HANDLE, None)]


def _watch_backward(model: Any, _: Any, output: Any) -> None:
    if not model.training or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _trains_all(model):
        return
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(_refuse)


def _trains_all(model: nn.Module) -> bool:
    """Whether a model holds FP8 weights, and all parameters that can have a gradient are to be trained."""
    scales = {id(scale) for module in fp8_modules(model).values() for scale in module.scales().values()}
    others = [p for p in model.parameters() if p.is_floating_point() and not is_fp8(p.dtype) and id(p) not in scales]
    others = [p for p in others if p.numel()]
    return bool(scales and others) and all(p.requires_grad for p in others)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    yield from (value for value in values if isinstance(value, torch.Tensor))


def _refuse(gradient: torch.Tensor) -> None:
    raise FP8StateError(
        "a converted model is being trained, with no parameter frozen and no adapter: weights in FP8 get no gradient, "
        "so that its norms, biases and embeddings alone would be trained. Train adapters "
        "(peft.get_peft_model(model, LoraConfig(...)), docs/lora.md), train for FP8 in high precision "
        "(FP8Config(fake_quant=True)), or call optimum_fp8.dequantize(model) and train all of it. To train what is in "
        "high precision alone, freeze what you leave as it is: parameter.requires_grad_(False)"
    )
