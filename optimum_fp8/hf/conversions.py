"""Operations on weights while transformers loads them, and which of a model's own conversions still apply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, _IdentityOp

from ..attention import CHILD
from ..checkpoint.names import ScaleBesideWeight
from ..config import FP8Config
from ..errors import FP8ScaleError
from ..formats import is_fp8, not_finite
from ..measure import Measurements, observer_class, weight_digest
from ..modules import FP8Module
from ..modules.fused_experts import FP8FusedExperts, PartOfExperts
from ..modules.fused_layout import to_out_in
from ..modules.handler import converted_modules
from ..modules.weight import stored_shape
from ..scales import quantize_weight


def _where_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def observe_weight(
    measured: Measurements, config: FP8Config, name: str, weight: torch.Tensor, maxabs: torch.Tensor
) -> None:
    """Remember what only a weight in high precision, `[out, in, …]`, can tell: its range, where that is measured."""
    if weight.is_meta or "weight" not in config.measured:  # on meta: loaded for its shapes and names alone
        return
    known = observer_class(measured.observer).from_range(maxabs, weight.numel())
    if known is not None:  # no second pass over the weight
        measured.add(name, "weight", known)
    else:
        measured.observe(name, "weight", weight)


@dataclass
class Loading:
    """What is learnt while weights are loaded.

    Attributes:
        observe_weight: called when a layer's weight became FP8, with its module's name, the high-precision weight as
            `[out, in, …]`, and its max|w|.
        digests: of weights that became FP8, by name, as they were in high precision.
        failures: why weights cannot be used, by module: transformers would bury an exception in its load report.
        missing_keys: transformers' own set, once any weight has been loaded.
        keep: gives each tensor that was made while loading the place where it stays.
    """

    observe_weight: Callable[[str, torch.Tensor, torch.Tensor], None]
    digests: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    missing_keys: set[str] | None = None
    keep: Callable[[torch.Tensor], torch.Tensor] = _where_it_is


def becomes_fp8(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter of a module in FP8 is brought in high precision, and quantized while it is loaded."""
    if (place := _in_stacks(module, parameter)) is not None:
        return place[1] in place[0].stack_names
    return isinstance(module, FP8Module) and parameter == "weight"


def _in_stacks(module: nn.Module, parameter: str) -> tuple[FP8FusedExperts, str] | None:
    """The experts that a parameter belongs to, and its name in them; None: it belongs to none."""
    if isinstance(module, PartOfExperts):
        return module.experts, f"{module.prefix}{parameter}"
    return (module, parameter) if isinstance(module, FP8FusedExperts) else None


class QuantizeWeight(ConversionOps):
    """Turn a weight into FP8 codes and their scale while it is loaded: one tensor is in flight at a time."""

    def __init__(self, loading: Loading):
        self.loading = loading

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """`{full name: tensor or [tensor]}` to `{full name: tensor}`, FP8 weights with their `weight_scale`, stacks of
        experts' weights with a scale of their own name."""
        self.loading.missing_keys = kwargs.get("missing_keys")
        result: dict[str, torch.Tensor] = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            name, _, parameter = key.rpartition(".")
            module = model.get_submodule(name)
            if not becomes_fp8(module, parameter):
                result[key] = self.loading.keep(tensor)
                continue
            if (place := _in_stacks(module, parameter)) is not None:
                codes, result[f"{key}_scale"] = self._stack(key, *place, tensor)
            else:
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
        self.loading.digests[f"{name}.weight"] = weight_digest(tensor)
        self.loading.observe_weight(name, weight, maxabs)
        return codes, scale

    def _stack(
        self, key: str, module: FP8FusedExperts, parameter: str, tensor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        room = module._parameters[parameter], module._parameters[f"{parameter}_scale"]
        expected, found = tuple(room[0].shape), tuple(to_out_in(module, parameter, tensor).shape)  # type: ignore[union-attr]
        try:
            if found != expected:
                raise FP8ScaleError(f"the checkpoint's weights are {found}, the model expects {expected}")
            codes, scale = module.quantized(parameter, tensor)
        except FP8ScaleError as error:
            self.loading.failures[key] = str(error)
            codes = torch.zeros(expected, dtype=module.scheme.fmt.dtype)
            return codes, torch.full(room[1].shape, torch.nan)  # type: ignore[union-attr]
        self.loading.digests[key] = weight_digest(tensor)
        return codes, scale


class OwnOperation(ConversionOps):
    """What is done to tensors of an FP8 checkpoint while they are loaded, and never taken back."""

    def __init__(self, loading: Loading):
        self.loading = loading

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnOperation:
        return self  # one converter is copied for every key

    @property
    def reverse_op(self) -> ConversionOps:
        return _IdentityOp()


class OwnRenaming(WeightRenaming):
    """What tensors of an FP8 checkpoint are called while they are loaded, and never taken back."""

    __slots__ = ()


class CheckCodes(OwnOperation):
    """Take FP8 codes as they are stored, `[1, out, in]`, and nothing else for the weight of an FP8 module."""

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


def freeze(model: nn.Module) -> None:
    """Take the gradient from codes and scales, to which transformers gives one."""
    for module, handler in converted_modules(model).values():
        for name, tensor in handler.held(module).items() if handler.family.replaced else ():
            if is_fp8(tensor.dtype) or name.endswith("_scale"):
                tensor.requires_grad_(False)


class ScaleRenaming(OwnRenaming):
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


def without_fp8(conversions: Iterable[Any], keys: Iterable[str]) -> list[Any]:
    """A model's weight conversions less those that would merge, split or permute FP8 weights, and less our own.

    An FP8 checkpoint keeps its weights as they are in memory, because codes and scales belong together.

    Args:
        conversions: of the model.
        keys: names of its tensors that are FP8 codes, as `keys_of_codes` gives them.
    """
    known = list(keys)
    return [each for each in conversions if not _is_ours(each) and not _touches(each, known)]


def keys_of_codes(model: nn.Module) -> list[str]:
    """The names in a checkpoint of all FP8 codes of a model, and what lies beside stacks of them."""
    return [
        f"{name}.{key}"
        for name, (module, handler) in converted_modules(model).items()
        if handler.family.replaced
        for key in handler.state(module)
        if not key.endswith("_scale") and key != "bias"
    ]


def _is_ours(conversion: Any) -> bool:
    ours = any(isinstance(each, OwnOperation) for each in getattr(conversion, "operations", ()))
    return ours or isinstance(conversion, (OwnRenaming, ScaleBesideWeight))


def _touches(conversion: Any, keys: list[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    targets = [re.sub(r"\\\d", ".*", target).replace("*.", r".*\.") for target in conversion.target_patterns]
    return any(
        conversion.compiled_sources.search(key) or any(re.search(target, key) for target in targets) for key in keys
    )
