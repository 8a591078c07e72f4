"""Models of diffusers: their own `save_pretrained` writes what `load` reads, and `load` makes them from `config.json`.

diffusers has no place where a quantization method of another package could be registered, so that its
`from_pretrained` refuses such a folder by the name of the method.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ..config import QUANT_METHOD
from ..errors import FP8CheckpointError, FP8NotAvailableError, FP8StateError
from ..lifecycle import FP8State, dequantize
from ..modules import fp8_modules
from ..modules.handler import Change
from .folder import DIFFUSERS, read_json
from .format import checkpoint_of
from .native import Native
from .whole_state import tensors_to_write


def attach_to_diffusers(model: Any, state: FP8State) -> None:
    """Have a converted model of diffusers write its scales and configuration when it is saved."""
    changes = [Change(model, "_internal_dict", model._internal_dict), Change(model, "hf_quantizer", None)]
    model.register_to_config(**{str(DIFFUSERS.key): Native().config(checkpoint_of(model))})
    model.hf_quantizer = _quantizer_class()(model)
    state.changes += changes


def made_from_config(folder: str, cls: Any = None) -> nn.Module:
    """The model that a folder is of, made from its `config.json`, without weights.

    Args:
        folder: what `save_pretrained` of a model of diffusers wrote.
        cls: its class; None: the one that the file names.

    Raises:
        FP8CheckpointError: diffusers has no class of that name, or `cls` is another.
        FP8NotAvailableError: diffusers is not installed.
    """
    path = os.path.join(folder, DIFFUSERS.config_file)
    said = read_json(path)
    name = said.get("_class_name")
    if cls is None:
        try:
            cls = getattr(import_module("diffusers"), str(name), None)
        except ImportError as error:
            raise FP8NotAvailableError(f"{path} is of diffusers, which is not there ({error}): install it") from error
    if cls is None or not hasattr(cls, "from_config") or cls.__name__ != name:
        found = "diffusers has none" if cls is None else f"found {cls.__name__}"
        raise FP8CheckpointError(f"{path} is of the class {name!r}, and {found}: pass its class, load(folder, {name})")
    with init_empty_weights():
        model: nn.Module = cls.from_config({key: value for key, value in said.items() if key != DIFFUSERS.key})
    return model.eval()


def in_saved_dtypes(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Have FP8 modules of a model that was made anew stand for weights of the dtypes that they had."""
    for name, module in fp8_modules(model).items():
        module.high_precision = getattr(torch, dtypes.get(name, ""), module.high_precision)


@cache
def _quantizer_class() -> Any:
    """What diffusers asks when it saves a model, or is to dequantize one."""
    base: Any = import_module("diffusers.quantizers").DiffusersQuantizer

    class FP8DiffusersQuantizer(base):
        """The quantizer of a converted model."""

        def __init__(self, model: Any):
            self.model, self.pre_quantized = model, True

        @property
        def quantization_config(self) -> Any:
            return self.model.config.quantization_config

        @property
        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True

        def get_state_dict_and_metadata(self, state_dict: Any, safe_serialization: bool = False) -> Any:
            if not safe_serialization:
                raise FP8NotAvailableError("FP8 models are saved as safetensors only: leave out safe_serialization")
            checkpoint = checkpoint_of(self.model)
            Native().refuse(checkpoint)
            return tensors_to_write(self.model, checkpoint, self.quantization_config, rebuilt=True)

        def dequantize(self, model: Any) -> Any:
            return dequantize(model)

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            raise _not_loaded_so(model)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            raise _not_loaded_so(model)

    return FP8DiffusersQuantizer


def _not_loaded_so(model: Any) -> FP8StateError:
    return FP8StateError(f"{type(model).__name__} in {QUANT_METHOD} is loaded by optimum_fp8.load")
