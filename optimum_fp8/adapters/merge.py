"""merge_lora: a LoRA adapter merged into an FP8 checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import ops
from ..checkpoint.digests import FILES, RECORD, SAVE, digest, id_of
from ..checkpoint.intact import record, recorded
from ..checkpoint.provenance import told_of
from ..checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from ..checkpoint.whole_folder import whole_folder
from ..commands.companions import copy_companions
from ..errors import FP8CheckpointError, FP8ConfigError
from ..files.source import INDEX, Stored, reading
from ..lifecycle import MERGED, with_change
from ..modules.weight import stored_weight
from ..scales import quantize_weight
from .lora import LoraWeights, open_adapter
from .places import Place, Places, places_of
from .report import MergedLayer, MergeReport

logger = logging.getLogger(__name__)

TRAINED_ON = ("base", "fp8")
# An original is not that of the checkpoint if the FP8 weights are further from it than from its own FP8 weights.
_ANOTHER = 2.0

Read = Callable[[Stored], torch.Tensor]


def merge_lora(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    trained_on: str,
    original: str | os.PathLike[str] | None = None,
) -> MergeReport:
    """Merge a LoRA adapter of peft's into an FP8 checkpoint; the folder that is written is whole or not there.

    With the original model, `W + B A · scaling` is quantized as the checkpoint was, which gives the codes that
    quantizing the merged original gives. Without, the FP8 weights are dequantized, changed and rounded again. Either
    way one tensor is in memory at a time. Weights that the adapter does not change keep their codes, and scales of
    activations stay. A layer that is in high precision is merged in its dtype.

    Args:
        model: the folder of an FP8 checkpoint of a model of transformers.
        adapter: a folder that peft saved: `adapter_config.json` and `adapter_model.safetensors`.
        output: a folder that is not there yet.
        trained_on: "base", the model in high precision, or "fp8", the FP8 model; errors are counted from there.
        original: the model that the checkpoint was quantized from, a folder or a name on the hub.

    Returns:
        which weights changed, and by how much they differ from what was trained.

    Raises:
        FP8ConfigError: an unknown `trained_on`.
        FP8CheckpointError: one of the folders does not hold what is expected, or they do not fit each other.
        FP8NotAvailableError: the adapter does more than adding to the weights of linear layers; the message says what.
        FP8ScaleError: a merged weight has no sound scale.
    """
    if trained_on not in TRAINED_ON:
        raise FP8ConfigError(
            f"trained_on={trained_on!r}: expected 'base' (the model in high precision) or 'fp8' (the FP8 model): an "
            "adapter makes up for the errors of the weights that it was trained beside"
        )
    weights = open_adapter(adapter)
    with whole_folder(output) as temporary:
        places = places_of(model, weights, original)
        layers = _write(places, trained_on, temporary)
        copy_companions(places.folder, temporary, apart_from=os.path.abspath(output))
        _copy_index(places.folder, temporary)
    scales = sum(key.endswith("_scale") and not key.endswith("weight_scale") for key in places.stored)
    report = MergeReport(os.path.abspath(output), trained_on, original is not None, tuple(layers), scales)
    if report.loss:
        logger.warning("%s", report.loss)
    return report


def _write(places: Places, trained_on: str, folder: str) -> list[MergedLayer]:
    """Write the files of weights, which hold the tensors that those of the checkpoint do."""
    told, layers = _metadata(places, trained_on), list[MergedLayer]()
    changed = {stored.key: place for place in places.changed for stored in place.parts.values()}
    with tqdm(total=len(places.stored), unit="tensor", desc="Merging", disable=None) as bar, reading() as read:
        done: dict[str, _Merged] = {}
        for path in places.files:
            here = [stored for stored in places.stored.values() if stored.path == path]
            specs = {each.key: TensorSpec(each.dtype, each.shape) for each in here if each.dtype is not None}
            with SafetensorsWriter(os.path.join(folder, os.path.basename(path)), specs, told) as writer:
                for stored in sorted(here, key=lambda each: each.key):
                    place = changed.get(stored.key)
                    if place is None:
                        writer.write(stored.key, read(stored))
                    else:
                        name = place.name
                        if name not in done:
                            done[name] = _merged(place, trained_on, read)
                            layers.append(done[name].layer)
                        part = "weight" if stored is place.parts["weight"] else "weight_scale"
                        writer.write(stored.key, done[name].tensors.pop(part))
                    bar.update(1)
    return sorted(layers, key=lambda each: each.name)


def _metadata(places: Places, trained_on: str) -> dict[str, str]:
    """What each file says of the model, and that an adapter was merged into it."""
    told, added_to = told_of(places.model), "fp8" if places.original is None else "base"
    told["provenance"] = with_change(told.get("provenance", {}), MERGED, trained_on=trained_on, added_to=added_to)
    before = recorded(places.files)
    if before.get("by_name"):
        told["by_name"] = True
    with reading() as read:
        added = {
            each.name: [digest(read(part)) for part in (each.weights.a, each.weights.b)] for each in places.changed
        }
    told |= {SAVE: id_of(before.get(SAVE), trained_on, added_to, added), FILES: len(places.files)}
    return {"format": "pt", RECORD: record(places.model, places.config, **told)}


@dataclass
class _Merged:
    """The tensors of a merged layer as they go to disk, by `weight` and `weight_scale`, and what it cost."""

    tensors: dict[str, torch.Tensor]
    layer: MergedLayer


def _merged(place: Place, trained_on: str, read: Read) -> _Merged:
    weights, delta = place.weights, place.weights.delta(read)
    if place.module is None:
        return _in_high_precision(place, delta, read)
    dtype = place.module.high_precision
    codes, scale = read(place.parts["weight"]).squeeze(0), read(place.parts["weight_scale"])
    of_codes, original = ops.cast_from_fp8(codes, scale, dtype), _original(place, read)
    if original is not None:
        _refuse_another(place, original, of_codes)

    def rounded(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scale and values of the FP8 weight that is made of a base."""
        assert place.module is not None
        scheme = place.module.scheme
        wanted = weights.added(base, delta, read).to(dtype)
        new, its_scale, _ = quantize_weight(wanted, scheme.weight, scheme.fmt, scheme.hp_dtype)
        return new, its_scale, ops.cast_from_fp8(new, its_scale, torch.float32)

    base, other = (of_codes, original) if original is None else (original, of_codes)
    trained = original if trained_on == "base" else of_codes
    new, new_scale, values = rounded(base)
    summed, exact = _sum(weights, base, delta, read), None if trained is None else _sum(weights, trained, delta, read)
    layer = MergedLayer(
        name=place.name,
        in_fp8=True,
        change=_distance(summed, base),
        rounding=_distance(values, summed),
        error=None if exact is None else _distance(values, exact),
        otherwise=None if exact is None or other is None else _distance(rounded(other)[2], exact),
    )
    return _Merged({"weight": stored_weight(new), "weight_scale": new_scale}, layer)


def _in_high_precision(place: Place, delta: torch.Tensor, read: Read) -> _Merged:
    """A layer in high precision, which has the same weight in the original: merged in its dtype."""
    stored = place.parts["weight"]
    weight = place.out_in(read(stored))
    merged = place.weights.added(weight, delta, read).to(weight.dtype)
    exact = _sum(place.weights, weight, delta, read)
    error = _distance(merged, exact)
    layer = MergedLayer(place.name, False, _distance(exact, weight), error, error, None)
    return _Merged({"weight": place.out_in(merged)}, layer)


def _original(place: Place, read: Read) -> torch.Tensor | None:
    """The original weight `[out, in]` in the dtype that the model is loaded in, or None."""
    if place.original is None:
        return None
    assert place.module is not None
    return place.out_in(read(place.original).to(place.module.high_precision))


def _refuse_another(place: Place, original: torch.Tensor, of_codes: torch.Tensor) -> None:
    """Refuse an original that the codes of the checkpoint were not made of."""
    assert place.module is not None
    scheme = place.module.scheme
    codes, scale, _ = quantize_weight(original, scheme.weight, scheme.fmt, scheme.hp_dtype)
    found = _distance(of_codes, original)
    if found > _ANOTHER * _distance(ops.cast_from_fp8(codes, scale, torch.float32), original):
        raise FP8CheckpointError(
            f"{place.original} is not what the FP8 weights of {place.name} were made of: they differ by "
            f"{100 * found:.1f} % of its norm; give the model that the checkpoint was quantized from"
        )


def _sum(weights: LoraWeights, base: torch.Tensor, delta: torch.Tensor, read: Read) -> torch.Tensor:
    return weights.added(base.float(), delta, read)


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found - exact‖ / ‖exact‖, of matrices in any dtype."""
    exact = exact.double()
    norm = float(exact.norm())
    return float((found.double() - exact).norm()) / norm if norm else float("nan")


def _copy_index(source: str, folder: str) -> None:
    """The index of several files: tensors lie where they lay, and are as large."""
    path = os.path.join(source, INDEX)
    if os.path.isfile(path) and not os.path.isfile(os.path.join(source, "model.safetensors")):
        with open(path, encoding="utf-8") as file:
            index: Mapping[str, Any] = json.load(file)
        with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
