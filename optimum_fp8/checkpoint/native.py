"""Our own checkpoints: `X.weight` `[1, out, in]` in FP8, `X.weight_scale`, and `X.input_scale` where it is static;
attention modules have `Y.fp8_scales.q_scale`, and likewise `k_scale`, `v_scale`, `p_scale`, `output_scale`, ….

The leading dimension of one makes transformers without this plugin refuse the checkpoint: it tolerates unknown names,
dtypes and missing scales with a warning, and would compute garbage, but it never loads a weight of a wrong shape.

Checkpoints of format version 1 have the scales of attention as `Y.q_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from ..attention import CHILD
from ..config import FORMAT_VERSION, KEYS, FP8Config
from ..errors import FP8CheckpointError
from ..formats import is_fp8
from ..modules.handler import Reason, Surroundings, Why, converted_modules, find_all
from ..modules.weight import stored_shape, stored_weight
from ..scales import unsound
from ..selection import (
    Decision,
    config_names,
    default_skips,
    limited,
    names_in_checkpoint,
    of_kinds_asked_for,
    schemes_of,
    type_names,
)
from .format import Checkpoint, Record, register_format
from .names import names_in_model

# Of a head that the defaults kept, the configuration tells why it is no FP8; of other modules it does not.
_KEPT = f"{Reason.NOT_IN_CHECKPOINT.value}, {Reason.KEPT.value}"

_WEIGHT, _WEIGHT_SCALE = "weight", "weight_scale"
_SCALED = (
    r"[qkpv]\d*|input(?:_key|_value)?|output|partial|intermediate|\w*weight(?:_[ih][hr]_l\d+(?:_reverse)?)?|[kv]_cache|"
    r"gate_up_proj|up_proj|down_proj"
)
SCALE = re.compile(rf"(.+?)\.(?:{CHILD}\.)?((?:{_SCALED})_scale)$")
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
            f"{record.name}.{name}": stored_weight(tensor) if is_fp8(tensor.dtype) else tensor
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
    config: FP8Config,
    selected: Sequence[tuple[Sequence[str], Sequence[str]]],
    left_out: Sequence[str],
    model_class: str | None = None,
) -> FP8Config:
    """The configuration a checkpoint carries: everything decided, nothing live, every exception by name.

    It tells nothing of the machine that it was made on: no path.

    Args:
        config: what the model was quantized with.
        selected: names and types of the modules in FP8.
        left_out: names of those that stay in high precision.
        model_class: of the model.
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
        dump_stats_path=KEYS["dump_stats_path"].default,
        calibration_log=None,
        dataset=None,
        tokenizer=None,
        processor=None,
        dequantize=False,
        model_class=model_class,
        format_version=FORMAT_VERSION,
    )


def saved_shapes(files: Sequence[str] | None, model: nn.Module | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in safetensors files, by the names they have there, or have in `model` once loaded."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files or ():
        if not str(path).endswith(".safetensors"):
            continue
        with refuse_damaged(path), safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return {name: shapes[key] for key, name in names_in_model(model, shapes).items()}


def saved_scales(files: Sequence[str] | None, model: nn.Module | None = None) -> Shapes:
    """Shapes of the scales in safetensors files, by module and name, as `saved_shapes` names them."""
    return scales_among(saved_shapes(files, model))


def scales_among(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shapes of the scales among those of tensors, by module and name."""
    saved: Shapes = {}
    for key, shape in shapes.items():
        if match := SCALE.match(key):
            saved.setdefault(match[1], {})[match[2]] = shape
    return saved


@contextmanager
def refuse_damaged(path: str) -> Iterator[None]:
    """Raise FP8CheckpointError where a safetensors file cannot be read inside."""
    try:
        yield
    except (SafetensorError, FileNotFoundError) as error:
        raise FP8CheckpointError(f"{path} cannot be read ({error}): it is damaged, copy it again") from None


def scales_in(names: Sequence[str], saved: Shapes) -> dict[str, tuple[int, ...]]:
    """The scales of a module in a checkpoint, where transformers may have renamed the models around it."""
    name = name_in(names, saved)
    return {} if name is None else saved[name]


def name_in(names: Sequence[str], saved: Collection[str]) -> str | None:
    """Which of the modules in a checkpoint a module is, where transformers may have renamed the models around it."""
    for name in names:
        if name in saved:
            return name
    parts = names[0].split(".")
    for depth in range(1, len(parts)):
        suffix = ".".join(parts[depth:])
        if not any(part.isdigit() for part in parts[depth:]):
            break
        found = [name for name in saved if name.endswith(f".{suffix}") or name == suffix]
        if len(found) == 1:
            return found[0]
    return None


def saved_decisions(
    model: nn.Module,
    config: FP8Config,
    files: list[str] | None,
    implementations: dict[int, str],
    recorded: Collection[str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Decision]:
    """Which modules are FP8 in a checkpoint: all of a known kind but those its configuration lists.

    What the checkpoint does not have (a classifier put on a saved base model, a head of another size) stays in high
    precision, and transformers initializes it.

    Args:
        model: of transformers, or any other.
        config: of the checkpoint.
        files: of the checkpoint.
        implementations: what computes attention, by the identity of the model's configuration.
        recorded: the modules that were in FP8 when it was saved; None where it does not say.
        shapes: of its tensors, by their names in the model; None: those in the files.
    """
    exceptions, prefix = set(config.modules_to_not_convert or []), f"{getattr(model, 'base_model_prefix', '')}."
    readable = bool(files) and all(str(path).endswith(".safetensors") for path in files or ())
    heads = set(default_skips(model))
    shapes = saved_shapes(files, model) if shapes is None else shapes
    saved = scales_among(shapes)
    found, around = find_all(model), Surroundings(model, implementations)
    schemes, names_in_config = schemes_of(model, found, config), config_names(model, found)
    had = set(recorded) if recorded is not None and _is_same_class(model) else set()
    decisions = []
    for name, (module, handler) in of_kinds_asked_for(found, schemes).items():
        names = names_in_checkpoint(name, prefix)
        scheme, limits, why = limited(handler, module, schemes[name], around, names, config)
        there = had.intersection(names) or any(_WEIGHT_SCALE in saved.get(alias, {}) for alias in names)
        absent = name in heads and readable and not there
        left_out = exceptions.intersection(names) or (handler.family.replaced and absent)
        if left_out or why.reason is not Reason.SELECTED:
            kept = handler.family.replaced and name in heads and not config.quantize_lm_head
            why = Why(Reason.NOT_IN_CHECKPOINT, _KEPT if kept else "")
        elif (
            handler.unlisted_before
            and readable
            and not _has_scales(names, saved)
            and set(recorded or ()).isdisjoint(names)
        ):
            why = Why(Reason.NOT_IN_CHECKPOINT)
        elif handler.family.replaced and readable and (new := _new_to(model, module, names, shapes, recorded)):
            why = Why(Reason.NOT_IN_CHECKPOINT, new)
        elif (refusal := handler.refusal(module, scheme, around)) and refusal.reason is Reason.IMPLEMENTATION_CHOSEN:
            why = refusal
        types, all_names = type_names(module), names_in_config[name]
        decisions.append(Decision(name, type(module).__name__, why, handler, scheme, types, all_names, limits))
    return decisions


def _has_scales(names: Sequence[str], saved: Collection[str]) -> bool:
    """Whether a checkpoint has scales of a module, or of parts of it."""
    dots = tuple(f"{name}." for name in names)
    return any(f"{module}.".startswith(dots) for module in saved)


def _new_to(
    model: Any,
    module: Any,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    recorded: Collection[str] | None,
) -> str | None:
    """How a module of `model` is new to a checkpoint with tensors of these shapes, or None.

    What the base model repeats, and all that a checkpoint of the same class must have, is not new but missing: what is
    recorded, or everything where nothing is.
    """
    name = names[0]
    if not isinstance(model, transformers.PreTrainedModel):  # what is loaded into other modules must be complete
        return None
    in_base = model is model.base_model or name.startswith(f"{model.base_model_prefix}.")
    if in_base and any(part.isdigit() for part in name.split(".")):
        return None
    found = next((shapes[key] for each in names if (key := f"{each}.{_WEIGHT}") in shapes), None)
    if found is not None:
        codes = len(found) == module.weight.ndim + 1
        other = codes and sorted(found) != sorted(stored_shape(module.weight.shape))
        return f"of another shape in the checkpoint: {found[1:]}" if other else None
    if not set(names).isdisjoint(scales_among(shapes)):  # its weights have names of their own
        return None
    tail = ".".join(name.split(".")[-2:])
    renamed = "." in tail and any(key.endswith(f".{tail}.{_WEIGHT}") for key in shapes)
    had = _is_same_class(model) and (recorded is None or not set(names).isdisjoint(recorded))
    return None if renamed or had else "new to the checkpoint"


def _is_same_class(model: Any) -> bool:
    """Whether a checkpoint, whose configuration `model` has, was saved by a model of this class."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def check_complete(model: nn.Module, missing_keys: set[str] | None, advice: str) -> None:
    """Refuse a checkpoint that lacks a tensor of a converted module: it would be left as uninitialized memory.

    Args:
        model: the model, loaded.
        missing_keys: names of what was not there; None if nothing was loaded.
        advice: what to do about it, for the message.

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
            f"{', …' if len(missing) > 4 else ''}): it is damaged, or was made with another model class; {advice}"
        )


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
