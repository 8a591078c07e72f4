"""The skeleton of a model whose class is not known: modules made of the names, shapes and dtypes in its files.

A matrix `X.weight` is taken for that of a `Linear` where nothing speaks against it: its bias, its name, the sizes in
`config.json`. What is in doubt stays in high precision. A weight taken for a `Linear`'s that is none makes the
checkpoint fail to load, by its shape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.intact import record
from ..checkpoint.model_config import without_quantization
from ..checkpoint.native import carried_config
from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8ConfigError, FP8NotAvailableError, FP8SelectionError
from ..hf.source import refuse_codes
from ..lifecycle import FP8State, Phase, convert_with, provenance_in
from ..measure import Measurements
from ..modules.weight import frozen
from ..selection import select, with_limits
from .plan import Skeleton
from .source import Source, Stored

# Words that tell, in the last parts of a module's name, what it is.
_TABLE = re.compile(r"emb|wte|wpe|vocab|token|position|relative|bias|codebook", re.IGNORECASE)
_HEAD = re.compile(r"(?:^|_)(?:head|classifier|score|logits)s?(?:$|_)|^cls$", re.IGNORECASE)
_ROUTER = re.compile(r"^(?:.*_)?(?:router|gate)$", re.IGNORECASE)
_ADAPTER = re.compile(r"lora_|adapter|ia3", re.IGNORECASE)


class NamedTensors(nn.Module):
    """Modules made of the names in files; those in `kept` have a matrix, and are no `Linear`, for the reason given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, str] = {}


def skeleton_by_name(source: Source, config: FP8Config, dtype: str | torch.dtype) -> Skeleton:
    """What conversion makes of the matrices in the source that look like those of a `Linear`.

    Raises:
        FP8SelectionError: none does, or the configuration leaves out all that do.
        FP8NotAvailableError: attention or a cache in FP8 is asked for.
        FP8CheckpointError: the weights are quantized already.
    """
    if config.wants_attention:
        raise FP8NotAvailableError(
            "attention and kv_cache are about modules that the names of weights do not tell: leave them out, or "
            "quantize with from_pretrained and the class of the model"
        )
    model = modules_by_name(source.tensors, source.config, _dtype(source, dtype), heads=config.quantize_lm_head)
    refuse_codes(nn.Linear(1, 1), source.files)  # all that is expected of names; the rest may be of a quantized weight
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        shown = (
            "; ".join(f"{name}: {why}" for name, why in list(model.kept.items())[:5]) or "no X.weight of two dimensions"
        )
        raise FP8SelectionError(f"nothing in {source.folder} looks like the weight of a Linear ({shown})")
    state = FP8State(config, select(model, config), Phase.MEASURING, Measurements("", observer=config.observer))
    convert_with(model, state)
    decisions = state.decisions
    left_out = [*(each.name for each in decisions if not each.selected), *model.kept]
    selected = [(each.names, each.types) for each in decisions if each.selected]
    said = (source.config.get("architectures") or [None])[0]
    carried = carried_config(with_limits(config, decisions), selected, left_out, said)
    saved = model.state_dict()
    made = provenance_in(model)
    provenance = {**made, "skipped": {**made["skipped"], **model.kept}}
    more = {"provenance": provenance, "model_config": without_quantization(source.config)}
    told = record(model, carried, by_name=True, **more)
    names = {name: name for name in saved}
    return Skeleton(model, saved, names, source.tensors, decisions, carried, told, model.kept, whole=False)


def modules_by_name(
    tensors: Mapping[str, Stored], config: Mapping[str, Any], dtype: torch.dtype | None, *, heads: bool
) -> NamedTensors:
    """Modules on meta with the tensors of files: `Linear` where they look like it.

    Args:
        tensors: by name.
        config: what `config.json` says.
        dtype: of all floating-point tensors; None leaves each its own.
        heads: whether output heads are `Linear` as well.
    """
    root, sizes = NamedTensors(), set(_sizes_of_tables(config))
    leaves: dict[str, dict[str, Stored]] = {}
    for key, stored in tensors.items():
        name, _, leaf = key.rpartition(".")
        leaves.setdefault(name, {})[leaf] = stored
    around = {name[:at] for name in leaves for at in _dots(name)}
    transposed = any(_says_transposed(own) for own in leaves.values())
    for name, own in leaves.items():
        weight = own.get("weight")
        why: str | None = "it is no module"
        if name and weight is not None and _is_float(weight):
            why = None if len(weight.shape) == 2 else f"a weight of {len(weight.shape)} dimensions"
            if why is None:
                inside = name in around or set(own) - {"weight", "bias"}
                why = "it holds more than a Linear" if inside else _unlike_linear(name, own, sizes, transposed, heads)
            if why is not None and len(weight.shape) > 1:
                root.kept[name] = why
        _put(root, name, own, None if why else nn.Linear, dtype)
    return root


def _unlike_linear(
    name: str, own: Mapping[str, Stored], sizes: Collection[int], transposed: bool, heads: bool
) -> str | None:
    """Why a matrix with this name does not look like the weight of a `Linear` that is to be quantized, or None."""
    (rows, columns), bias = own["weight"].shape, own.get("bias")
    parts = [part for part in name.split(".") if not part.isdigit()]
    last, tail = parts[-1] if parts else "", parts[-2:]
    if bias is not None and bias.shape != (rows,):
        return f"its bias of shape {bias.shape} is not one of a Linear"
    if transposed and (bias is None or rows == columns):
        return "other weights here are stored as [in, out], as this one may be"
    if any(map(_ADAPTER.search, parts)):
        return "by its name it belongs to an adapter"
    if _TABLE.search(last):
        return "by its name it is an embedding or a table"
    if _ROUTER.search(last):
        return "by its name it is a router"
    outside = not any(part.isdigit() for part in name.split("."))
    if not heads and (any(map(_HEAD.search, tail)) or (outside and rows in sizes)):
        return "by its name or size it is an output head or an embedding"
    if heads and outside and rows in sizes and not _HEAD.search(last):
        return "by its size it may be an embedding"
    return None


def _says_transposed(own: Mapping[str, Stored]) -> bool:
    """Whether weight and bias fit each other as those of transformers' `Conv1D` do, `[in, out]`."""
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or bias is None or len(weight.shape) != 2 or weight.shape[0] == weight.shape[1]:
        return False
    return bias.shape == (weight.shape[1],)


def _sizes_of_tables(config: Mapping[str, Any]) -> Iterator[int]:
    """The numbers of rows that embeddings and heads have, in the configuration and those inside."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _sizes_of_tables(value)
        elif isinstance(value, int) and ("vocab" in key or "position_embeddings" in key):
            yield value


def _dots(name: str) -> list[int]:
    return [at for at, letter in enumerate(name) if letter == "."]


def _is_float(stored: Stored) -> bool:
    return stored.dtype is None or stored.dtype.is_floating_point  # what torch has no dtype for is refused later


def _put(
    root: nn.Module, name: str, own: Mapping[str, Stored], kind: type[nn.Linear] | None, dtype: torch.dtype | None
) -> None:
    """Put a module with these tensors into its place. Names need not be such as attributes can have."""
    parts, owner = name.split(".") if name else [], root
    for part in parts[:-1] if kind is not None else parts:
        if part not in owner._modules:
            owner._modules[part] = nn.Module()
        owner = owner._modules[part]  # type: ignore[assignment]
    if kind is not None:
        rows, columns = own["weight"].shape
        owner._modules[parts[-1]] = owner = kind(columns, rows, bias="bias" in own, device="meta")
    for leaf, stored in own.items():
        if stored.dtype is None:
            raise FP8CheckpointError(f"{stored} is of a dtype that torch does not have: it cannot be copied")
        wanted = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        owner._parameters[leaf] = frozen(torch.empty(stored.shape, dtype=wanted, device="meta"))


def _dtype(source: Source, dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype asked for, or that of `config.json`; None where neither says one."""
    said = dtype if dtype != "auto" else source.config.get("dtype") or source.config.get("torch_dtype")
    if said is None:
        return None
    found = getattr(torch, str(said).removeprefix("torch."), None)
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise FP8ConfigError(f"dtype={said!r}: expected auto, bfloat16, float16 or float32")
    return found
