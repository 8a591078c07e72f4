"""quantize_files: an FP8 checkpoint from a folder of safetensors, file by file, without the model in memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.digests import id_of
from ..checkpoint.plain import CONFIG_FILE
from ..checkpoint.whole_folder import explained, put_in_place
from ..commands.companions import copy_companions
from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8ConfigError, FP8NotAvailableError
from ..measure import why_unwritable
from .by_name import skeleton_by_name
from .plan import Plan, Skeleton, layers_of, plan
from .shards import write_shards
from .shared_scales import share_scales as with_siblings
from .skeleton import known_class, skeleton_of_class, write_config
from .source import INDEX, Source, open_source

logger = logging.getLogger(__name__)

_PARTIAL, _MANIFEST = ".partial", ".manifest.json"  # hidden: not copied from a source in which the output lies
_UNFINISHED = ".tmp"
_VERSION = 2
_WITH_MODEL = (
    "use activation_scheme='dynamic' or 'weight_only', or quantize with the model: "
    "from_pretrained(…, quantization_config=…) and save_pretrained"
)


@dataclass(frozen=True)
class FilesReport:
    """What became of a folder.

    Attributes:
        output: where the checkpoint is.
        layers: the modules in FP8.
        kept: why other modules with weights stay in high precision, by name.
        in_fp8: how many parameters are in FP8.
        parameters: how many there are.
        size: of the files of weights, in bytes.
        by_name: whether names and shapes told what to quantize, because the class of the model is not known.
    """

    output: str
    layers: tuple[str, ...]
    kept: Mapping[str, str]
    in_fp8: int
    parameters: int
    size: int
    by_name: bool


def quantize_files(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: FP8Config | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    workers: int = 1,
    share_scales: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    names_only: bool = False,
) -> FilesReport:
    """Quantize the weights of a checkpoint file by file, with one tensor in memory at a time, and no model.

    The result is what `from_pretrained(source, quantization_config=config)` and `save_pretrained(output)` make, where
    transformers knows the model; elsewhere names and shapes tell which weights are those of a `Linear`. What is
    written stands in `<output>.partial` until it is whole: the same call, made again, goes on with what is missing.

    Args:
        source: a folder with safetensors, or a name on the hub.
        output: where the checkpoint goes.
        config: what to quantize and how, dynamically or weights only: static scales need data and the model.
        dtype: of what stays in high precision: "auto" (what `config.json` says), "bfloat16", "float16" or "float32".
        workers: how many processes write files.
        share_scales: give q, k and v of a block one scale, and gate and up, as engines need that fuse them.
        max_shard_size: of one file, as `save_pretrained` takes it.
        overwrite: replace the output, and what an unfinished run with other arguments left.
        names_only: go by names and shapes even where transformers knows the model.

    Raises:
        FP8NotAvailableError: the configuration needs data.
        FP8ConfigError: the output exists or cannot be made, or an argument is wrong.
        FP8CheckpointError: the source is quantized already, damaged, or holds no safetensors; an unfinished run with
            other arguments is in the way; or the disk is full.
        FP8ScaleError: a weight holds NaN or Inf.
    """
    name, target = os.fspath(source), os.path.abspath(output)
    config = _decided(FP8Config(activation_scheme="dynamic") if config is None else config)
    if not isinstance(workers, int) or workers < 1:
        raise FP8ConfigError(f"workers={workers!r}: expected a whole number from 1")
    _check_output(name, target, overwrite)
    opened = open_source(name)
    skeleton = _skeleton(opened, config, dtype, names_only)
    layers = layers_of(skeleton)
    if share_scales:
        layers = with_siblings(layers)
    planned = plan(opened, skeleton, layers, max_shard_size)
    manifest = _manifest(opened, skeleton, planned, share_scales)
    with explained(target, f"files that are whole stay in {target}{_PARTIAL}, and the same call goes on with them"):
        folder = _work_folder(target, manifest, overwrite)
        write_shards(planned.of_save(id_of(manifest)), folder, workers)
        _write_beside(opened, skeleton, planned, folder, target)
        _move(folder, target)
    return _report(target, skeleton, planned)


def _decided(config: FP8Config) -> FP8Config:
    """The configuration with dynamic scales where it left that open.

    Raises:
        FP8NotAvailableError: it needs data, or a model to measure.
    """
    if not isinstance(config, FP8Config):
        raise FP8ConfigError(f"quantize_files: expected an FP8Config, found {config!r}: use FP8Config(…)")
    config = config.replace()  # checks keys that were assigned since it was made
    for key in ("dataset", "dequantize", "fold_batch_norm"):
        if getattr(config, key):
            raise FP8NotAvailableError(f"{key} needs the model, which quantize_files does not build: {_WITH_MODEL}")
    if config.mode != "AUTO":
        raise FP8NotAvailableError(
            f"mode={config.mode!r} is about measurements, which need the model: quantize_files does not build it: "
            f"{_WITH_MODEL}"
        )
    for place, part in config.variants.items():
        if part.attention:
            raise FP8NotAvailableError(
                f"{place or 'attention=True'}: attention in FP8 has scales of its own, which need the model, and "
                f"quantize_files does not build it: {_WITH_MODEL}"
            )
        if part.scheme == "static" and part.method.activation.needs_range:
            raise FP8NotAvailableError(
                f"{place or 'activation_scheme'}: static scales need calibration data and therefore the model, which "
                f"quantize_files does not build: {_WITH_MODEL}"
            )
    if config.scheme == "auto":
        logger.warning("no calibration data: activations are scaled dynamically (activation_scheme='dynamic')")
        config = config.replace(activation_scheme="dynamic")
    return config


def _check_output(source: str, target: str, overwrite: bool) -> None:
    if os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(target):
        raise FP8ConfigError(f"output {target!r} is the source itself: choose another folder")
    if os.path.exists(target) and not overwrite and (not os.path.isdir(target) or os.listdir(target)):
        raise FP8ConfigError(f"output {target!r} exists: choose another folder, or pass overwrite=True")
    if reason := why_unwritable(os.path.dirname(target)):
        raise FP8ConfigError(f"output {target!r} cannot be made: {reason}; choose another folder")


def _skeleton(source: Source, config: FP8Config, dtype: str | torch.dtype, names_only: bool) -> Skeleton:
    known = None if names_only else known_class(source)
    if known is not None:
        return skeleton_of_class(source, known, config, dtype)
    if not names_only:
        said = source.config.get("architectures") or "no config.json with architectures"
        logger.warning(
            "transformers knows no class for %s (%s): names and shapes tell which weights are those of a Linear; what "
            "is in doubt stays in high precision",
            source.folder,
            said,
        )
    return skeleton_by_name(source, config, dtype)


# --- files --------------------------------------------------------------------------------------------------------


def _manifest(source: Source, skeleton: Skeleton, planned: Plan, share_scales: bool) -> dict[str, Any]:
    """What has to be the same for the files of an unfinished run to be those that are wanted."""
    shards = {
        file: [[each.name, str(each.spec.dtype), *each.spec.shape] for each in outputs]
        for file, outputs in planned.shards.items()
    }
    return {
        "version": _VERSION,
        "source": source.identity(),
        "config": skeleton.config.to_dict(),
        "schemes": {name: str(layer.scheme) for name, layer in planned.layers.items()},
        "share_scales": share_scales,
        "files": shards,
    }


def _work_folder(target: str, manifest: dict[str, Any], overwrite: bool) -> str:
    """The folder for the files of this run: a new one, or that of the same run, broken off.

    Raises:
        FP8CheckpointError: another run was broken off there.
    """
    partial = f"{target}{_PARTIAL}"
    folder, path = os.path.join(partial, "files"), os.path.join(partial, _MANIFEST)
    if os.path.exists(partial):
        known, wanted = _known(partial, path), json.loads(json.dumps(manifest))
        differing = sorted(key for key in wanted if known.get(key) != wanted[key])
        if differing and known and not overwrite:
            raise FP8CheckpointError(
                f"{partial} is what an unfinished run left, which had another {' and another '.join(differing)}: make "
                "the same call again to go on with it, or remove that folder, or pass overwrite=True"
            )
        if differing:
            shutil.rmtree(partial)
    os.makedirs(partial, exist_ok=True)
    temporary = f"{path}.{os.getpid()}{_UNFINISHED}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(manifest, file)
    os.replace(temporary, path)
    os.makedirs(folder, exist_ok=True)
    return folder


def _known(partial: str, path: str) -> dict[str, Any]:
    """The manifest of an unfinished run; empty where it was broken off before it wrote one.

    Raises:
        FP8CheckpointError: the folder is of something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError):
        if os.path.isdir(partial) and all(name.endswith(_UNFINISHED) for name in os.listdir(partial)):
            return {}
        raise FP8CheckpointError(
            f"{partial} is in the way: files are written there until they are whole, and it holds something else; "
            "move it, or choose another output"
        ) from None


def _write_beside(source: Source, skeleton: Skeleton, planned: Plan, folder: str, target: str) -> None:
    """Write everything but the weights, which are there."""
    for name in os.listdir(folder):  # what a worker that was killed left
        if name not in planned.shards:
            os.remove(os.path.join(folder, name))
    if planned.index is not None:
        with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
            file.write(json.dumps(planned.index, indent=2, sort_keys=True) + "\n")
    said = skeleton.config.to_dict()
    if skeleton.whole:
        write_config(skeleton.model, folder)
    else:
        _dump(said, os.path.join(folder, CONFIG_FILE))
        if source.config:
            _dump({**source.config, "quantization_config": said}, os.path.join(folder, "config.json"))
    copy_companions(source.folder, folder, apart_from=target)


def _dump(said: Mapping[str, Any], path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(said, file, indent=2)


def _move(folder: str, target: str) -> None:
    """Put the finished folder into its place."""
    put_in_place(folder, target)
    shutil.rmtree(os.path.dirname(folder))


def _report(target: str, skeleton: Skeleton, planned: Plan) -> FilesReport:
    kept = {each.name: each.reason for each in skeleton.decisions if not each.selected} | dict(skeleton.kept)
    outputs = [output for outputs in planned.shards.values() for output in outputs]
    counts = {output.name: output.spec.nbytes // output.spec.dtype.itemsize for output in outputs}
    in_fp8 = sum(counts[output.name] for output in outputs if output.is_codes)
    scales = sum(counts[output.name] for output in outputs if output.is_scale)
    size = sum(output.spec.nbytes for output in outputs)
    whole = sum(counts.values()) - scales
    return FilesReport(target, tuple(planned.layers), kept, in_fp8, whole, size, not skeleton.whole)
