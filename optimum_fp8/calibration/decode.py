"""Decoding during calibration: attention also has to be measured where it runs token by token over a cache."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput


def decodes(model: nn.Module) -> bool:
    """Whether `model` is one of transformers' models that generate."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate())


def decoding_inputs(
    model: Any, inputs: Mapping[str, Any], output: Any, steps: int
) -> Generator[dict[str, Any], Any, None]:
    """Inputs that go on greedily from a forward pass, one token at a time.

    Args:
        model: a model that generates.
        inputs: what the forward pass was called with.
        output: what it returned; without a cache or logits in it there is nothing to go on from.
        steps: how many tokens.

    Yields:
        keyword arguments of the next forward pass; send its output back with `send`.
    """
    mask = inputs.get("attention_mask")
    # transformers has renamed the argument, and warns of the old name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for _ in range(steps):
        cache = getattr(output, "past_key_values", None)
        cache, logits = getattr(output, "cache", cache), getattr(output, "logits", None)
        if cache is None or not isinstance(logits, torch.Tensor) or logits.ndim != 3:
            return
        token = logits[:, -1:].argmax(dim=-1)
        following: dict[str, Any] = {name: cache, "use_cache": True}
        encoded = getattr(output, "encoder_last_hidden_state", None)
        if encoded is not None:
            following |= {"decoder_input_ids": token, "encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}
        else:
            following["input_ids"] = token
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        if isinstance(mask, torch.Tensor):
            following["attention_mask"] = mask
        output = yield following
