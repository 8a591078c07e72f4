"""All tensors of a converted model as they are written, with the record that goes into the files' metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import FP8Config
from ..errors import FP8NotAvailableError
from ..measure import architecture
from ..modules import fp8_modules, part_of
from .digests import RECORD, sealed
from .folder import Tensors
from .format import Checkpoint
from .intact import record
from .native import Native
from .provenance import told_of


def tensors_to_write(
    model: nn.Module, checkpoint: Checkpoint, said: Mapping[str, Any], *, rebuilt: bool = False
) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a converted model that share no memory, and the metadata of the files that hold them.

    Args:
        model: converted.
        checkpoint: of it.
        said: the configuration that is written with them.
        rebuilt: whether the model will be made anew from its class, and not be given: then what its class computes
            for itself (tables of positions) goes along, since it depends on the dtype that it was made in.

    Raises:
        FP8NotAvailableError: some are offloaded, or no tensors.
    """
    native, buffers = Native(), buffers_of(model) if rebuilt else {}
    tensors, shared = _apart(state_tensors(model) | native.tensors(checkpoint) | buffers)
    more: dict[str, Any] = {"architecture": architecture(model), "shared": shared, "part": part_of(model)}
    if rebuilt:
        dtypes = {name: str(each.high_precision).removeprefix("torch.") for name, each in fp8_modules(model).items()}
        more |= {"buffers": sorted(buffers), "dtypes": dtypes}
    more |= sealed(tensors, said)
    return tensors, {RECORD: record(model, FP8Config.from_dict(dict(said)), **told_of(model), **more)}


def state_tensors(model: nn.Module) -> Tensors:
    """The state of a model by name.

    Raises:
        FP8NotAvailableError: some of it is no tensor.
    """
    state: dict[str, Any] = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise FP8NotAvailableError(
                f"{name} is of type {type(value).__name__}: only tensors can be saved and loaded"
            )
    return state


def buffers_of(model: nn.Module) -> Tensors:
    """The buffers of a model that are no part of its state."""
    state = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in state}


def _apart(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, str]]:
    """Tensors that share no memory, and for each other name which of them it is.

    Raises:
        FP8NotAvailableError: some are offloaded.
    """
    apart, shared, first, storages = Tensors(), dict[str, str](), dict[Any, str](), set[int]()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise FP8NotAvailableError(f"{name} is offloaded: load the model without offloading, to save it")
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and same in first:
            shared[name] = first[same]
            continue
        first[same], memory = name, tensor.untyped_storage()
        whole = tensor.is_contiguous() and tensor.numel() * tensor.itemsize == memory.nbytes()
        alone = whole and memory.data_ptr() not in storages
        apart[name] = tensor.detach() if alone else tensor.detach().clone(memory_format=torch.contiguous_format)
        storages.add(memory.data_ptr())
    return apart, shared
