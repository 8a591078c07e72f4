"""Operations on weights while transformers loads them, and which of a model's own conversions still apply."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, _IdentityOp

from ..errors import FP8ScaleError
from ..modules import FP8Module, quantize_weight

if TYPE_CHECKING:
    from .quantizer import FP8Quantizer


class QuantizeWeight(ConversionOps):
    """Turn a weight into FP8 codes and their scale while it is loaded: one tensor is in flight at a time."""

    def __init__(self, quantizer: FP8Quantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """`{full name: tensor or [tensor]}` to `{full name: tensor}`, FP8 weights with their `weight_scale`."""
        self.quantizer.missing_keys = kwargs.get("missing_keys")
        result: dict[str, torch.Tensor] = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            name, _, parameter = key.rpartition(".")
            module = model.get_submodule(name)
            if not isinstance(module, FP8Module) or parameter != "weight":
                result[key] = tensor
                continue
            result[key], result[f"{name}.weight_scale"] = self._quantize(name, module, tensor)
        return result

    def _quantize(self, name: str, module: FP8Module, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            weight, expected = module.canonical(tensor), tuple(module.weight.shape)
            if tuple(weight.shape) != expected:  # transformers leaves the shapes of quantized weights to the quantizer
                raise FP8ScaleError(f"the checkpoint's weight is {tuple(weight.shape)}, the model expects {expected}")
            codes, scale, maxabs = quantize_weight(weight, self.quantizer.quantization_config, module.recipe.fmt)
        except FP8ScaleError as error:
            # transformers would bury an exception in its load report: the quantizer raises it when loading is done.
            self.quantizer.failures[name] = str(error)
            return torch.zeros(module.weight.shape, dtype=module.weight.dtype), torch.full((1,), torch.nan)
        self.quantizer.observe_weight(name, tensor, maxabs)
        return codes, scale


class SqueezeWeight(ConversionOps):
    """Take an FP8 weight out of its leading dimension of one (`[1, out, in]` on disk, `[out, in]` in memory)."""

    def __init__(self, quantizer: FP8Quantizer):
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> SqueezeWeight:
        return self  # one converter is copied for every key

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`{pattern: [tensor]}` to `{pattern: tensor}`; weights of other modules pass through."""
        self.quantizer.missing_keys = kwargs.get("missing_keys")
        name = kwargs["full_layer_name"].rpartition(".")[0]
        module = kwargs["model"].get_submodule(name)
        result = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if isinstance(module, FP8Module):
            for key, tensor in result.items():
                stored, expected = (tensor.dtype, tuple(tensor.shape)), module.recipe.fmt.dtype
                if stored == (expected, (1, *module.weight.shape)):
                    result[key] = tensor.squeeze(0)
                else:
                    self.quantizer.failures[name] = f"found {stored}, expected {(expected, (1, *module.weight.shape))}"
                    result[key] = torch.zeros(module.weight.shape, dtype=expected, device=tensor.device)
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        return _IdentityOp()  # the quantizer adds the dimension to every weight that is saved


def without_fp8(conversions: Iterable[Any], fp8_names: Iterable[str]) -> list[Any]:
    """A model's weight conversions less those that would merge, split or permute FP8 weights.

    An FP8 checkpoint keeps its weights as they are in memory, because codes and scales belong together.
    """
    keys = [f"{name}.weight" for name in fp8_names]
    return [conversion for conversion in conversions if not _touches(conversion, keys)]


def _touches(conversion: Any, keys: list[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    targets = [re.sub(r"\\\d", ".*", target).replace("*.", r".*\.") for target in conversion.target_patterns]
    return any(
        conversion.compiled_sources.search(key) or any(re.search(target, key) for target in targets) for key in keys
    )
