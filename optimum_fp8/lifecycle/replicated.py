"""Converted models under DistributedDataParallel: FP8 codes stay out of what it sends when it wraps a model.

It sends the parameters of rank 0 to all processes once, those without gradient too. gloo cannot send FP8. Each process
has the same codes without that: it has loaded the same checkpoint, or converted by the ranges of all processes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..formats import is_fp8

_ATTRIBUTE = "_ddp_params_and_buffers_to_ignore"  # where it looks for names; peft's models pass on who asks
_WRAPPERS = ("", "base_model.model.")  # what names begin with: of the model itself, and as part of a model of peft's


class NamesOfCodes:
    """The names of a model's FP8 parameters as they are when asked for: adapters that are added change them."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __iter__(self) -> Iterator[str]:
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if is_fp8(parameter.dtype):
                yield from (f"{wrapper}{name}" for wrapper in _WRAPPERS)


def keep_codes_out_of_broadcasts(model: nn.Module, converted: bool) -> None:
    """Have DistributedDataParallel leave the FP8 codes of a converted model alone, and no longer of one that is not."""
    if converted:
        model.__dict__[_ATTRIBUTE] = NamesOfCodes(model)
    elif isinstance(model.__dict__.get(_ATTRIBUTE), NamesOfCodes):
        del model.__dict__[_ATTRIBUTE]
