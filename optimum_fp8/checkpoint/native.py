"""Our own checkpoints: `X.weight` `[1, out, in]` in FP8, `X.weight_scale`, and `X.input_scale` where it is static;
attention modules have `Y.fp8_scales.q_scale`, and likewise `k_scale`, `v_scale`, `p_scale`, `output_scale`, ….

The leading dimension of one makes transformers without this plugin refuse the checkpoint: it tolerates unknown names,
dtypes and missing scales with a warning, and would compute garbage, but it never loads a weight of a wrong shape.

Checkpoints of format version 1 have the scales of attention as `Y.q_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..attention import CHILD
from ..config import FORMAT_VERSION, FP8Config
from ..errors import FP8CheckpointError
from ..formats import number_format
from ..modules.base import stored_weight
from ..modules.handler import Reason, Surroundings, Why, converted_modules, find_all
from ..scales import unsound
from ..selection import (
    Decision,
    config_names,
    default_skips,
    names_in_checkpoint,
    of_kinds_asked_for,
    schemes_of,
    type_names,
)
from .format import Checkpoint, Record, register_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHT, _WEIGHT_SCALE = "weight", "weight_scale"
_SCALE = re.compile(rf"(.+?)\.(?:{CHILD}\.)?((?:[qkpv]\d*|input|output|weight|[kv]_cache)_scale)$")
Shapes = dict[str, dict[str, tuple[int, ...]]]


class Native:
    """The four methods of a format, for ours."""

    def refuse(self, checkpoint: Checkpoint) -> None:
        """Raise FP8CheckpointError for scales that are not set, zero, negative, NaN or infinite."""
        tensors = (
            (record.name, name, tensor) for record in checkpoint.records for name, tensor in record.tensors.items()
        )
        refuse_unsound(tensors, "saved")

    def tensors(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Codes with a leading dimension of one, all else as it is."""
        return {
            f"{record.name}.{name}": stored_weight(tensor) if name == _WEIGHT else tensor
            for record in checkpoint.records
            for name, tensor in record.tensors.items()
        }

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The configuration a checkpoint carries, as a dictionary."""
        assert checkpoint.config is not None
        return carried_config(checkpoint.config, checkpoint.selected, checkpoint.left_out).to_dict()

    def records(self, files: Sequence[str]) -> Checkpoint:
        """The converted modules in safetensors files: names and shapes of their scales, as tensors without data."""
        records = [
            Record(name, "", None, {scale: torch.empty(shape, device="meta") for scale, shape in shapes.items()})
            for name, shapes in saved_scales(files).items()
        ]
        return Checkpoint(records, [], [], None)


register_format("optimum_fp8", Native())


def carried_config(
    config: FP8Config, selected: Sequence[tuple[Sequence[str], Sequence[str]]], left_out: Sequence[str]
) -> FP8Config:
    """The configuration a checkpoint carries: everything decided, nothing live, every exception by name.

    Args:
        config: what the model was quantized with.
        selected: names and types of the modules in FP8.
        left_out: names of those that stay in high precision.
    """
    return config.decided(
        "static",
        selected,
        mode="LOAD",
        target=config.resolved_target,
        dynamic_quantization=False,
        allowlist=None,
        blocklist=None,
        modules_to_not_convert=list(left_out),
        dataset=None,
        tokenizer=None,
        processor=None,
        dequantize=False,
        format_version=FORMAT_VERSION,
    )


def saved_scales(files: Sequence[str] | None) -> Shapes:
    """Shapes of the scales in safetensors files, by module and name."""
    saved: Shapes = {}
    for path in files or ():
        if not str(path).endswith(".safetensors"):
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if match := _SCALE.match(key):
                        saved.setdefault(match[1], {})[match[2]] = tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise FP8CheckpointError(f"{path} cannot be read ({error}): it is damaged, copy it again") from None
    return saved


def scales_in(names: Sequence[str], saved: Shapes) -> dict[str, tuple[int, ...]]:
    """The scales of a module in a checkpoint, where transformers may have renamed the models around it."""
    for name in names:
        if name in saved:
            return saved[name]
    parts = names[0].split(".")
    for depth in range(1, len(parts)):
        suffix = ".".join(parts[depth:])
        if not any(part.isdigit() for part in parts[depth:]):
            break
        found = [name for name in saved if name.endswith(f".{suffix}") or name == suffix]
        if len(found) == 1:
            return saved[found[0]]
    return {}


def saved_decisions(
    model: PreTrainedModel, config: FP8Config, files: list[str] | None, implementations: dict[int, str]
) -> list[Decision]:
    """Which modules are FP8 in a checkpoint: all of a known kind but those its configuration lists.

    Heads the checkpoint does not have (a classifier put on a saved base model) stay in high precision.
    """
    exceptions, prefix = set(config.modules_to_not_convert or []), f"{model.base_model_prefix}."
    readable = bool(files) and all(str(path).endswith(".safetensors") for path in files or ())
    heads, saved = set(default_skips(model)), saved_scales(files)
    found, around = find_all(model), Surroundings(model, implementations)
    schemes, names_in_config = schemes_of(model, found, config), config_names(model, found)
    decisions = []
    for name, (module, handler) in of_kinds_asked_for(found, schemes).items():
        scheme, names = schemes[name], names_in_checkpoint(name, prefix)
        absent = name in heads and readable and not any(_WEIGHT_SCALE in saved.get(alias, {}) for alias in names)
        why = Why(Reason.SELECTED)
        if exceptions.intersection(names) or (handler.family.replaced and absent) or not handler.concerned(scheme):
            why = Why(Reason.NOT_IN_CHECKPOINT)
        elif (refusal := handler.refusal(module, scheme, around)) and refusal.reason is Reason.IMPLEMENTATION_CHOSEN:
            why = refusal
        types, all_names = type_names(module), names_in_config[name]
        decisions.append(Decision(name, type(module).__name__, why, handler, scheme, types, all_names))
    return decisions


def check_complete(model: nn.Module, missing_keys: set[str] | None) -> None:
    """Refuse a checkpoint that lacks a tensor of a converted module: it would be left as uninitialized memory.

    Raises:
        FP8CheckpointError: names the tensors.
    """
    needed = {
        f"{name}.{key}" for name, (module, handler) in converted_modules(model).items() for key in handler.state(module)
    }
    missing = sorted(needed if missing_keys is None else needed & missing_keys)
    if missing:
        raise FP8CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of modules in FP8 ({', '.join(missing[:4])}"
            f"{', …' if len(missing) > 4 else ''}): it is damaged, or was made with another model class; modules that "
            "are new to the model go into modules_to_not_convert"
        )


def fit_to_target(model: nn.Module, decisions: Sequence[Decision], made_for: str) -> None:
    """Bring codes and scales within the full scale of the target a checkpoint is loaded for.

    Gaudi2 reads E4M3 codes above 240 as Inf. Codes made for a full scale of 448 are halved and scales doubled: a power
    of two keeps all values but the smallest subnormal ones, where 240/448 would round nearly all of them again.

    Raises:
        FP8CheckpointError: codes exceed the target's full scale although the checkpoint says they were made for it.
        FP8NotAvailableError: codes have to be changed and some weights are offloaded.
    """
    formats = {each.name: each.scheme.fmt for each in decisions}
    for name, (module, handler) in converted_modules(model).items():
        fmt = formats[name]
        handler.fit(name, module, number_format(fmt.name, made_for), fmt)


def refuse_unsound(tensors: Iterable[tuple[str, str, torch.Tensor]], action: str) -> None:
    """Refuse scales among tensors, given with their module and name (`action`: "loaded" or "saved").

    Raises:
        FP8CheckpointError: names the first that is not set, zero, negative, NaN or infinite.
    """
    for module, name, tensor in tensors:
        if name.endswith("_scale") and (wrong := unsound(tensor)):
            raise FP8CheckpointError(
                f"{module}.{name} {wrong}: it cannot be {action}; the checkpoint is damaged, quantize the original "
                "model again"
            )


def check_scales(model: nn.Module, action: str) -> None:
    """Refuse unsound scales of all converted modules of a model, see `refuse_unsound`."""
    refuse_unsound(
        (
            (name, key, tensor)
            for name, (module, handler) in converted_modules(model).items()
            for key, tensor in handler.state(module).items()
        ),
        action,
    )
