"""Operations on weights while transformers loads them, and which of a model's own conversions still apply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, _IdentityOp

from ..attention import CHILD
from ..errors import FP8ScaleError
from ..formats import not_finite
from ..modules import FP8Module
from ..modules.weight import stored_shape
from ..scales import quantize_weight


def _where_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass
class Loading:
    """What is learnt while weights are loaded.

    Attributes:
        observe_weight: called when a weight became FP8, with the name, the high-precision weight as it is stored and as
            `[out, in, …]`, and its max|w|.
        failures: why weights cannot be used, by module: transformers would bury an exception in its load report.
        missing_keys: transformers' own set, once any weight has been loaded.
        keep: gives each tensor that was made while loading the place where it stays.
    """

    observe_weight: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]
    failures: dict[str, str] = field(default_factory=dict)
    missing_keys: set[str] | None = None
    keep: Callable[[torch.Tensor], torch.Tensor] = _where_it_is


class QuantizeWeight(ConversionOps):
    """Turn a weight into FP8 codes and their scale while it is loaded: one tensor is in flight at a time."""

    def __init__(self, loading: Loading):
        self.loading = loading

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """`{full name: tensor or [tensor]}` to `{full name: tensor}`, FP8 weights with their `weight_scale`."""
        self.loading.missing_keys = kwargs.get("missing_keys")
        result: dict[str, torch.Tensor] = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            name, _, parameter = key.rpartition(".")
            module = model.get_submodule(name)
            if not isinstance(module, FP8Module) or parameter != "weight":
                result[key] = self.loading.keep(tensor)
                continue
            codes, result[f"{name}.weight_scale"] = self._quantize(name, module, tensor)
            result[key] = self.loading.keep(codes)
        return result

    def _quantize(self, name: str, module: FP8Module, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scheme = module.scheme
        try:
            weight, expected = module.to_out_in(tensor), tuple(module.weight_shape)
            if tuple(weight.shape) != expected:  # transformers leaves the shapes of quantized weights to the quantizer
                raise FP8ScaleError(f"the checkpoint's weight is {tuple(weight.shape)}, the model expects {expected}")
            codes, scale, maxabs = quantize_weight(weight, scheme.weight, scheme.fmt, scheme.hp_dtype)
        except FP8ScaleError as error:
            self.loading.failures[name] = str(error)
            return torch.zeros(expected, dtype=scheme.fmt.dtype), torch.full((1,), torch.nan)
        self.loading.observe_weight(name, tensor, weight, maxabs)
        return codes, scale


class CheckCodes(ConversionOps):
    """Take FP8 codes as they are stored, `[1, out, in]`, and nothing else for the weight of an FP8 module."""

    def __init__(self, loading: Loading):
        self.loading = loading

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckCodes:
        return self  # one converter is copied for every key

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`{pattern: [tensor]}` to `{full name: tensor}`; weights of other modules pass through."""
        self.loading.missing_keys = kwargs.get("missing_keys")
        full_name = kwargs["full_layer_name"]
        name = full_name.rpartition(".")[0]
        module = kwargs["model"].get_submodule(name)
        (value,) = input_dict.values()
        tensor = value[0] if isinstance(value, list) else value
        if isinstance(module, FP8Module):
            expected = (module.scheme.fmt.dtype, stored_shape(module.weight_shape))
            found = (tensor.dtype, tuple(tensor.shape))
            if found != expected or not_finite(tensor):
                wrong = "codes that are NaN or Inf" if found == expected else str(found)
                self.loading.failures[name] = f"found {wrong}, expected {expected}"
                tensor = torch.zeros(expected[1], dtype=expected[0], device=tensor.device)
        return {full_name: tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        return _IdentityOp()


class ScaleRenaming(WeightRenaming):
    """Renames attention's scales in checkpoints of format version 1: `Y.q_scale` to `Y.fp8_scales.q_scale`.

    Args:
        modules: names of the attention modules.
    """

    __slots__ = ("pattern",)

    def __init__(self, modules: Iterable[str]):
        leaves = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in modules}))
        super().__init__(rf"({leaves})\.", rf"\1.{CHILD}.")
        self.pattern = re.compile(rf"((?:^|\.)(?:{leaves})\.)((?:[qkpv]\d*|input|output|[kv]_cache)_scale)$")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed, count = self.pattern.subn(rf"\1{CHILD}.\2", source_key)
        if not count:
            return source_key, None
        self._was_used = True
        return renamed, self.source_patterns[0]


def without_fp8(conversions: Iterable[Any], fp8_names: Iterable[str]) -> list[Any]:
    """A model's weight conversions less those that would merge, split or permute FP8 weights, and less our own.

    An FP8 checkpoint keeps its weights as they are in memory, because codes and scales belong together.
    """
    keys = [f"{name}.weight" for name in fp8_names]
    return [each for each in conversions if not _is_ours(each) and not _touches(each, keys)]


def _is_ours(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return isinstance(conversion, ScaleRenaming) or any(isinstance(each, CheckCodes) for each in operations)


def _touches(conversion: Any, keys: list[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    targets = [re.sub(r"\\\d", ".*", target).replace("*.", r".*\.") for target in conversion.target_patterns]
    return any(
        conversion.compiled_sources.search(key) or any(re.search(target, key) for target in targets) for key in keys
    )
