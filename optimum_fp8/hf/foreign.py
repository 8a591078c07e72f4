"""Loading what others saved: their names become ours, their codes and scales what an FP8 module of ours holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter

from ..checkpoint.foreign import Source, source_of
from ..checkpoint.foreign.check import as_ours
from ..checkpoint.foreign.source import keys_by_name
from ..checkpoint.intact import check_intact
from ..checkpoint.names import ScaleBesideWeight, names_in_model
from ..checkpoint.native import saved_shapes
from ..config import KEYS, FP8Config
from ..errors import FP8CheckpointError
from ..modules import FP8Module
from ..modules.experts import FP8Experts
from ..modules.handler import converted_modules
from ..selection import Decision, names_in_checkpoint
from .conversions import CheckCodes, Loading, OwnOperation, OwnRenaming

logger = logging.getLogger(__name__)

_SCALES = ("weight_scale", "input_scale", "k_scale", "v_scale")


# --- before loading -----------------------------------------------------------------------------------------------


def shapes_in(model: Any, config: FP8Config, files: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, as ours are stored, by their names in the model.

    Where the checkpoint is a foreign one, `config` is made to call its modules as the model does.
    """
    source = source_of(config)
    if source is None:
        return saved_shapes(files, model)
    source.check_files(files)
    names = names_in_model(model, source.shapes)
    modules = {_module(key): _module(name) for key, name in names.items() if key != name}
    said = keys_by_name(source, {name: getattr(config, name) for name, key in KEYS.items() if key.of_module}, modules)
    config.overrides, config.modules_to_not_convert = said["overrides"], said["modules_to_not_convert"]
    if leaves := "|".join(sorted({re.escape(key.rpartition(".")[2]) for key in source.found.unread})):
        # What is known to change nothing is not reported as unexpected.
        known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        model._keys_to_ignore_on_load_unexpected = {*known, rf"\.(?:{leaves})$"}
    return {names[key]: shape for key, shape in source.shapes.items()}


def check_files(
    model: nn.Module, decisions: Sequence[Decision], config: FP8Config, made_for: str, files: Sequence[str] | None
) -> None:
    """Refuse a checkpoint whose tensors do not fit its configuration, and a foreign one that has more in FP8 than the
    model can take.

    Raises:
        FP8CheckpointError: names the tensor, the key or the module.
    """
    source = source_of(config)
    if source is None:
        check_intact(model, decisions, config, made_for, files)
        return
    keys = [f"{name}.weight" for name in source.found.layers]
    converted, prefix = converted_modules(model), f"{getattr(model, 'base_model_prefix', '')}."
    taken = {f"{name}.{key}" for name, (module, handler) in converted.items() for key in handler.state(module)}
    whys = {each.name: each.reason for each in decisions}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for key in names_in_model(model, keys).values():
        name = _module(key)
        if any(re.search(pattern, key) for pattern in ignored):  # such as layers that predict more tokens at once
            continue
        names = names_in_checkpoint(name, prefix)
        if any(f"{each}.weight" in taken for each in names):
            continue
        why = next((whys[each] for each in names if each in whys), "the model has no such layer")
        stacks = [each for each, (module, _) in converted.items() if name.startswith(f"{each}.")]
        if stacks:
            why = f"{stacks[0]} of this model keeps its experts in other tensors"
        raise FP8CheckpointError(
            f"quant_method={source.method!r}: {name} is in FP8 in the checkpoint, but cannot be in "
            f"{type(model).__name__} ({why}): load it with the class it was made with"
        )


# --- while loading ------------------------------------------------------------------------------------------------


def foreign_conversions(model: nn.Module, source: Source, known: Sequence[Any], loading: Loading) -> list[Any]:
    """What is done to the names and tensors of a foreign checkpoint, beside the model's own conversions."""
    transposed = any(layer.transposed for layer in source.found.layers.values())
    scales = [WeightConverter(rf"\.{name}$", f".{name}", [TakeScale(loading)]) for name in _SCALES]
    codes = WeightConverter(r"\.weight$", ".weight", [TakeCodes(loading, transposed)])
    experts = [*_scales_of_experts(model, loading)]
    return [ForeignNames(source.renamed), *known, ScaleBesideWeight(), *experts, codes, *scales]


def keeps_dtype(conversion: Any) -> bool:
    """Whether tensors are wanted in the dtype that they have on disk: bytes may be exponents."""
    return any(isinstance(each, TakeScale) for each in getattr(conversion, "operations", ()))


class ForeignNames(OwnRenaming):
    """Renames the tensors of a foreign checkpoint, one by one.

    Args:
        names: their names as ours, by those in the files.
    """

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, str]):
        super().__init__(r"^never\.$", "never.")
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed = self.names.get(source_key, source_key)
        return renamed, None if renamed == source_key else self.source_patterns[0]


class TakeCodes(CheckCodes):
    """Take FP8 codes as others store them, `[out, in]`, or `[in, out]` where they are `transposed`."""

    def __init__(self, loading: Loading, transposed: bool = False):
        super().__init__(loading)
        self.transposed = transposed

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`{pattern: [tensor]}` to `{full name: tensor}`, with the leading dimension of ours."""
        module = kwargs["model"].get_submodule(_module(kwargs["full_layer_name"]))
        if isinstance(module, FP8Module):
            codes = {key: _only(value) for key, value in input_dict.items()}
            codes = {key: each.t().contiguous() if self.transposed else each for key, each in codes.items()}
            input_dict = {key: each.unsqueeze(0) for key, each in codes.items()}
        return super().convert(input_dict, *args, **kwargs)


class TakeScale(OwnOperation):
    """Take a scale as others store it: any floating-point dtype or exponents, with or without dimensions of one."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`{pattern: [tensor]}` to `{full name: tensor}`: float32, of the shape that the module expects."""
        self.loading.missing_keys = kwargs.get("missing_keys")
        full_name = kwargs["full_layer_name"]
        name, _, leaf = full_name.rpartition(".")
        module = kwargs["model"].get_submodule(name)
        room = module._parameters.get(leaf)
        expected = tuple((module._buffers[leaf] if room is None else room).shape)
        return {full_name: self._taken(full_name, [_only(each) for each in input_dict.values()][0], expected)}

    def _taken(self, name: str, scale: torch.Tensor, expected: tuple[int, ...]) -> torch.Tensor:
        try:
            return as_ours(scale, expected)
        except FP8CheckpointError as error:
            self.loading.failures[name] = str(error)
            return torch.full(expected, torch.nan)


class TakeScalesOfExperts(TakeScale):
    """Take the static scales of experts' inputs: one for the input of all of them, the largest, or one for each.

    Args:
        loading: what is learnt while loading.
        shared: whether it is one.
    """

    def __init__(self, loading: Loading, shared: bool):
        super().__init__(loading)
        self.shared = shared

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`{pattern: [tensor]}` to `{full name: tensor}`."""
        self.loading.missing_keys = kwargs.get("missing_keys")
        full_name = kwargs["full_layer_name"]
        scales = [self._taken(full_name, each, (1,)) for values in input_dict.values() for each in values]
        together = torch.cat(scales)
        if not self.shared:
            return {full_name: together.reshape(-1, 1, 1)}
        if bool((together != together[0]).any()):
            logger.warning(
                "%s: the checkpoint has %d scales of the experts' input between %g and %g, of which the largest is "
                "taken for all, as engines do",
                *(full_name, len(together), together.min(), together.max()),
            )
        return {full_name: together.amax(dim=0, keepdim=True)}


def _scales_of_experts(model: nn.Module, loading: Loading) -> Iterator[WeightConverter]:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, (module, _) in converted_modules(model).items():
        if not isinstance(module, FP8Experts) or not module.scheme.is_static or not module.parts:
            continue
        there = rf"^(?:{re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}\.\d+"  # with the base model's or not
        *upper, down = (rf"{there}\.{re.escape(part)}\.input_scale$" for part in module.parts)
        yield WeightConverter(upper, f"{name}.input_scale", [TakeScalesOfExperts(loading, True)])
        yield WeightConverter([down], f"{name}.intermediate_scale", [TakeScalesOfExperts(loading, False)])


def _only(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _module(key: str) -> str:
    return key.rpartition(".")[0]
