"""export: an FP8 checkpoint in the format of another engine, tensor by tensor."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from .. import ops
from ..checkpoint import Checkpoint, Format, Record, checkpoint_of, format_called
from ..checkpoint.digests import FILES, RECORD, SAVE, id_of, signed
from ..checkpoint.format import FormatWithFiles
from ..checkpoint.native import refuse_unsound
from ..checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from ..checkpoint.whole_folder import whole_folder
from ..commands.companions import copy_companions
from ..errors import FP8CheckpointError, FP8ConfigError
from ..files.source import INDEX, Stored, reading
from . import inc_folder
from .fused_layers import tie_fused
from .inc_folder import inc_files, write_inc_folder
from .native_source import CONFIG, NativeSource, open_native

logger = logging.getLogger(__name__)

FORMATS = ("compressed-tensors", "fp8", "modelopt", inc_folder.NAME)


def export(
    model: nn.Module | str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    without: Collection[str] = (),
) -> str:
    """Write an FP8 model as a checkpoint that other engines load; the folder is whole or not there.

    One tensor is in memory at a time. Layers that engines fuse get one scale per tensor, the largest of theirs, and
    their codes are rounded again where that is another one.

    Args:
        model: a converted model of transformers, or the folder it was saved to.
        output: a folder that is not there yet.
        format: "compressed-tensors" (vLLM, SGLang, transformers), "fp8" (transformers, vLLM: blocks and MXFP8 only) or
            "modelopt" (vLLM, SGLang, TensorRT-LLM). "inc" holds no weights, but what Intel Neural Compressor quantizes
            the model in high precision by: static scales.
        without: scales of attention to leave out, such as "p_scale": engines find their own.

    Returns:
        the path of the folder.

    Raises:
        FP8ConfigError: an unknown format, or a scale in `without` that attention does not have.
        FP8StateError: the model is not converted.
        FP8CheckpointError: the format cannot express the model, before anything is written; the folder exists; or the
            source is no FP8 checkpoint of a model of transformers.
    """
    if isinstance(without, str):
        raise FP8ConfigError(f"without={without!r}: expected a list of names, [{without!r}]")
    if format not in FORMATS:
        raise FP8ConfigError(f"format={format!r} is not one to export to: expected {' or '.join(map(repr, FORMATS))}")
    with whole_folder(output) as temporary, _folder_of(model, output) as folder:
        source = open_native(folder)
        checkpoint = _prepared(source.checkpoint, set(without))
        if format == inc_folder.NAME:
            written = {inc_folder.CONFIG: write_inc_folder(source, inc_files(source, checkpoint), temporary)}
        else:
            made_of = (sorted(without), source.saved)
            written = _write_checkpoint(source, tie_fused(checkpoint), format_called(format), temporary, made_of)
        for name, content in written.items():
            _write_json(os.path.join(temporary, name), content)
        if format != inc_folder.NAME:  # which is no model, and goes beside one
            copy_companions(source.folder, temporary, apart_from=os.path.abspath(output))
    return os.path.abspath(output)


@contextmanager
def _folder_of(model: Any, output: str | os.PathLike[str]) -> Iterator[str]:
    if not isinstance(model, nn.Module):
        yield os.fspath(model)
        return
    checkpoint_of(model)  # refuses what is not converted
    if not isinstance(model, transformers.PreTrainedModel):
        raise FP8CheckpointError(f"{type(model).__name__} is no model of transformers, which engines load")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(output)), prefix=".fp8-") as folder:
        model.save_pretrained(folder)
        yield folder


def _prepared(checkpoint: Checkpoint, without: Collection[str]) -> Checkpoint:
    """What is to be exported: sound scales, without those that are left to the engine."""
    of_attention = {name for record in checkpoint.records if "weight" not in record.tensors for name in record.tensors}
    if unknown := sorted(set(without) - of_attention):
        found = ", ".join(sorted(of_attention)) or "none"
        raise FP8ConfigError(f"without={unknown}: attention has no such scale in this checkpoint, only: {found}")
    records = [
        replace(record, tensors={name: tensor for name, tensor in record.tensors.items() if name not in without})
        if "weight" not in record.tensors
        else record
        for record in checkpoint.records
    ]
    scales = (
        (each.name, name, tensor) for each in records for name, tensor in each.tensors.items() if name != "weight"
    )
    refuse_unsound(scales, "exported")
    if checkpoint.config is not None and checkpoint.config.fold_batch_norm:
        raise FP8CheckpointError(
            "a model with folded batch norms (fold_batch_norm=True) cannot be exported: engines build the model with "
            "its batch norms; quantize it without folding"
        )
    return replace(checkpoint, records=records)


def _write_checkpoint(
    source: NativeSource, checkpoint: Checkpoint, chosen: Format, folder: str, made_of: Sequence[Any]
) -> dict[str, Any]:
    """Write the weights, and return the JSON to write beside them, by the names of the files.

    Args:
        made_of: what the id of the save follows from, beside the configuration.
    """
    chosen.refuse(checkpoint)
    _warn_of_tied(source, checkpoint)
    config = {**source.config, "quantization_config": chosen.config(checkpoint)}
    _write(source, checkpoint, chosen, folder, id_of(config, *made_of))
    written = {CONFIG: config}
    return written | (chosen.files(checkpoint) if isinstance(chosen, FormatWithFiles) else {})


def _warn_of_tied(source: NativeSource, checkpoint: Checkpoint) -> None:
    """Say what the scales cost that fused layers share: codes are rounded a second time, as engines do themselves."""
    before = {record.name: record.tensors for record in source.checkpoint.records}
    after = {record.name: record.tensors for record in checkpoint.records}
    scaled = [name for name, tensors in after.items() if "weight_scale" in tensors]
    tied = [name for name in scaled if not torch.equal(after[name]["weight_scale"], before[name]["weight_scale"])]
    if tied:
        logger.warning(
            "%d layers, as %s, get the scale of the layers that engines fuse them with, and their codes are rounded "
            "again: quantize with scales by channel, or quantize_files(share_scales=True), to round them once",
            *(len(tied), tied[0]),
        )


def _write(source: NativeSource, checkpoint: Checkpoint, chosen: Format, folder: str, save: str) -> None:
    """Write the files of weights, each with what the file of the source has of the same name, and their index."""
    metadata = {"format": "pt", RECORD: signed({SAVE: save, FILES: len(source.files)})}
    of_records = {each.key for parts in source.parts.values() for each in parts.values()}
    weight_map, total = dict[str, str](), 0
    with tqdm(total=len(source.stored), unit="tensor", desc="Exporting", disable=None) as bar:
        for path in source.files:
            records = [each for each in checkpoint.records if _path_of(source, each) == path]
            plain = [each for key, each in source.stored.items() if each.path == path and key not in of_records]
            name = os.path.basename(path)
            specs = _write_file(os.path.join(folder, name), records, plain, source, chosen, metadata, bar.update)
            weight_map |= dict.fromkeys(specs, name)
            total += sum(spec.nbytes for spec in specs.values())
    if len(source.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(os.path.join(folder, INDEX), index)


def _write_json(path: str, content: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _path_of(source: NativeSource, record: Record) -> str | None:
    """The file that a record's weight lies in, or its scales where it has none."""
    parts = source.parts.get(record.name, {})
    return parts["weight"].path if "weight" in parts else next((each.path for each in parts.values()), None)


def _write_file(
    path: str,
    records: Sequence[Record],
    plain: Sequence[Stored],
    source: NativeSource,
    chosen: Format,
    metadata: Mapping[str, str],
    progress: Callable[[int], Any],
) -> dict[str, TensorSpec]:
    """Write one file, and return what is in it."""
    own = {record.name: record for record in source.checkpoint.records}
    made = [(record, chosen.tensors(Checkpoint([record], [], [], None))) for record in records]
    specs = {each.key: TensorSpec(each.dtype, each.shape) for each in plain if each.dtype is not None}
    for _, tensors in made:
        specs |= {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with SafetensorsWriter(path, specs, metadata) as writer, reading() as read:
        for each in plain:
            writer.write(each.key, read(each))
            progress(1)
        for record, tensors in made:
            for key, tensor in tensors.items():
                codes = tensor.is_meta
                writer.write(
                    key,
                    _codes(read(source.parts[record.name]["weight"]), own[record.name], record) if codes else tensor,
                )
                progress(1)
    return specs


def _codes(stored: torch.Tensor, before: Record, after: Record) -> torch.Tensor:
    """The codes `[out, in]` of a layer, rounded again where it has been given another scale."""
    codes, scale, tied = stored.squeeze(0), before.tensors["weight_scale"], after.tensors["weight_scale"]
    if torch.equal(scale, tied):
        return codes
    assert after.scheme is not None
    logger.info("%s: rounded again, because it shares the scale of the layers it is fused with", after.name)
    values = ops.cast_from_fp8(codes, scale, torch.float32)
    return ops.cast_to_fp8(values, tied, codes.dtype, after.scheme.fmt.full_scale)
