"""Writing the files of a plan, one tensor in memory at a time, in this process or in several."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import reduce
from multiprocessing import get_context
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from .. import ops
from ..checkpoint.safetensors_writer import DTYPES, SafetensorsWriter, TensorSpec
from ..errors import FP8ScaleError, FP8StateError
from ..modules.expert_tensors import quantized_stack
from ..modules.weight import stored_weight
from ..scales import quantize_weight
from ..scales.weight import scale_of_weight
from .plan import Layer, Output, Plan
from .source import Stored, reading

logger = logging.getLogger(__name__)

Read = Callable[[Stored], torch.Tensor]


def write_shards(plan: Plan, folder: str, workers: int) -> None:
    """Write those files of a plan into `folder` that are not there yet.

    Raises:
        FP8ScaleError: a weight has no sound scale; the message names it and its file.
        FP8StateError: a worker died.
    """
    todo = {
        name: outputs for name, outputs in plan.shards.items() if not _is_there(os.path.join(folder, name), outputs)
    }
    if done := len(plan.shards) - len(todo):
        logger.info("%d of %d files are there already", done, len(plan.shards))
    total = sum(_size(outputs) for outputs in todo.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Quantizing", disable=None) as bar:
        for name, seconds in _written(todo, folder, plan.metadata, min(workers, len(todo)), bar.update):
            layers = sum(output.is_codes for output in todo[name])
            size = _size(todo[name]) / 1e6
            logger.info("%s: %d weights in FP8, %.1f MB, %.1f s", name, layers, size, seconds)


def write_shard(
    path: str, outputs: list[Output], metadata: Mapping[str, str], progress: Callable[[int], Any] | None = None
) -> float:
    """Write one file, whole or not at all; how many seconds it took."""
    started = time.monotonic()
    by_layer: dict[str, list[Output]] = {}
    for output in outputs:
        if isinstance(output.made_of, Layer):
            by_layer.setdefault(output.made_of.name, []).append(output)
    specs = {output.name: output.spec for output in outputs}
    with SafetensorsWriter(path, specs, metadata) as writer, reading() as read:

        def write(output: Output, tensor: torch.Tensor) -> None:
            writer.write(output.name, tensor)
            if progress is not None:
                progress(output.spec.nbytes)

        for output in outputs:
            made_of = output.made_of
            if isinstance(made_of, torch.Tensor):
                write(output, made_of)
            elif isinstance(made_of, Stored):
                write(output, read(made_of).to(output.spec.dtype))
        for parts in by_layer.values():
            layer = parts[0].made_of
            assert isinstance(layer, Layer)
            codes, scale = _quantized(layer, read)
            for output in parts:
                write(output, stored_weight(codes) if output.is_codes else scale)
            del codes
    return time.monotonic() - started


def _quantized(layer: Layer, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[out, in, …]` and scale of a weight; of a stack `[experts, out, in]`.

    Raises:
        FP8ScaleError: it has no sound scale.
    """
    scheme = layer.scheme
    scale = reduce(torch.maximum, (_scale(each, read) for each in layer.together)) if layer.together else None
    weight = _weight(layer, read)
    if scale is not None:
        return ops.cast_to_fp8(weight, scale, scheme.fmt.dtype, scheme.fmt.full_scale).contiguous(), scale
    try:
        if layer.experts:
            return quantized_stack(weight, layer.halves, scheme)
        return quantize_weight(weight, scheme.weight, scheme.fmt, scheme.hp_dtype)[:2]
    except FP8ScaleError as error:
        raise FP8ScaleError(f"{layer.stored}: {error}") from None


def _scale(layer: Layer, read: Read) -> torch.Tensor:
    try:
        return scale_of_weight(_weight(layer, read), layer.scheme.weight, layer.scheme.fmt, layer.scheme.hp_dtype)
    except FP8ScaleError as error:
        raise FP8ScaleError(f"{layer.stored}: {error}") from None


def _weight(layer: Layer, read: Read) -> torch.Tensor:
    weight = read(layer.stored).to(layer.dtype)
    return layer.to_out_in(weight)


def _size(outputs: list[Output]) -> int:
    return sum(output.spec.nbytes for output in outputs)


def _is_there(path: str, outputs: list[Output]) -> bool:
    """Whether a file is there that holds these tensors: files appear when they are whole."""
    try:
        with safe_open(path, framework="pt") as file:
            views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: TensorSpec(DTYPES[view.get_dtype()], tuple(view.get_shape())) for key, view in views.items()}
    except (OSError, SafetensorError):
        return False
    return found == {output.name: output.spec for output in outputs}


# --- processes ----------------------------------------------------------------------------------------------------


def _written(
    todo: Mapping[str, list[Output]],
    folder: str,
    metadata: Mapping[str, str],
    workers: int,
    progress: Callable[[int], Any],
) -> Iterator[tuple[str, float]]:
    """Write files, and yield the name of each that is done, and how many seconds it took."""
    if workers < 2:
        for name, outputs in todo.items():
            yield name, write_shard(os.path.join(folder, name), outputs, metadata, progress)
        return
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        futures = {
            pool.submit(write_shard, os.path.join(folder, name), outputs, metadata): name
            for name, outputs in todo.items()
        }
        for future in as_completed(futures):
            name = futures[future]
            seconds = future.result()
            progress(_size(todo[name]))
            yield name, seconds
    except BrokenProcessPool as error:
        raise FP8StateError(
            f"a worker ended before its file was written ({error}): was it killed for want of memory, or is the call "
            'outside of `if __name__ == "__main__":` in a script? The files that are whole are kept: run it again, '
            "with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
