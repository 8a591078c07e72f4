"""Calibrating block by block: all data go through one block, which is then in FP8 for those that follow."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import get_cpu_distributed_information
from torch import nn

from ...config import FP8Config
from ...errors import FP8ConfigError, FP8NotAvailableError
from ...lifecycle import FP8State, convert_some, name_of_data, refuse_unreached
from ...measure import Observers
from ...modules.handler import Target
from ..coverage import shortcomings
from ..progress import Progress
from .blocks import parts_of
from .file_memory import give_back_freed
from .finished import FinishedParts, work_folder
from .kept import InMemory, Kept, OnDisk
from .stored_data import StoredData
from .walk import Walk, joined, scouted

logger = logging.getLogger(__name__)


def check_sequential(config: FP8Config) -> None:
    """Refuse what does not go block by block, before anything is loaded.

    Raises:
        FP8ConfigError: there is nothing to calibrate.
        FP8NotAvailableError: what is asked for needs the whole model at once, or this process is one of several.
    """
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = torch.distributed.get_world_size() if grouped else get_cpu_distributed_information().world_size
    if count > 1:
        raise FP8NotAvailableError(
            f"calibration='sequential' in {count} processes at once: it runs in one; start it without torchrun and the "
            "like, or use calibration='whole'"
        )
    if config.mode == "MEASURE":
        raise FP8NotAvailableError(
            "calibration='sequential' quantizes each block before the next is calibrated, and mode='MEASURE' leaves "
            "the model in high precision: use mode='AUTO', or calibration='whole'"
        )
    if config.dataset is None:
        raise FP8ConfigError("calibration='sequential' has nothing to calibrate with: pass dataset=…, or leave it out")
    if any(each.kv_cache for each in config.variants.values()):
        raise FP8NotAvailableError(
            "calibration='sequential' does not measure caches, which takes decoding with the whole model: leave "
            "kv_cache out, or use calibration='whole'"
        )
    if config.num_calibration_samples == "auto":
        raise FP8NotAvailableError(
            "calibration='sequential' takes all samples through one block before the next: "
            "num_calibration_samples='auto' cannot tell when to stop; give a number, or use calibration='whole'"
        )


def calibrate_sequentially(model: nn.Module, state: FP8State, batches: Iterator[Any]) -> None:
    """Calibrate a model whose weights are in FP8 already, block by block, and have each compute in FP8 from then on.

    A run of the same model, configuration and data that was broken off is gone on with.

    Args:
        model: the model; its state is measuring, and nothing is observed.
        state: that of the model.
        batches: the calibration data; they are kept, as `calibration_inputs` says.

    Raises:
        FP8CalibrationError: the model cannot be run block by block, or the data cannot be used.
        FP8MeasurementError: the data do not reach modules that have to be calibrated.
    """
    parts = parts_of(model, state.selected)
    targets = state.targets(model)
    measured = [each for each in targets if each.scheme.needs_ranges]
    state.change_around(model, measured)
    with torch.no_grad(), _place_to_keep(state.config) as kept:
        data = StoredData(model, batches, kept, prompts=state.config.wants_attention)
        route = joined([scouted(model, parts, partial(data.run, batch)) for batch in data.kinds.values()])
        unreached = [each for name in parts if name not in route.order for each in _inside(name, targets)]
        refuse_unreached(model, unreached, state.config.ignore_modules_wo_measures)
        convert_some(model, [each for each in targets if not each.scheme.needs_ranges])
        finished = FinishedParts(state.config, state.measurements, str(getattr(model, "dtype", "")), data.digest)
        goals = [name for name in route.order if _inside(name, measured)]
        _go(model, state, data, goals, Walk(model, parts, route, data.run, kept), finished)
    state.measurements.samples += data.samples
    state.measurements.data = data.digest
    state.sources.append(name_of_data(state.config.dataset))
    state.tokens += data.tokens
    for sentence in shortcomings(model, state, state.config, data.tokens, data.repeats):
        logger.warning("%s", sentence)
    finished.remove()


def _go(
    model: nn.Module, state: FP8State, data: StoredData, goals: list[str], walk: Walk, finished: FinishedParts
) -> None:
    """Calibrate the parts that are not finished, and have each compute in FP8 once it is."""
    progress = Progress(state.config, device=next((each.device for each in model.parameters()), None))
    progress.of, done = data.samples * len(goals), len(finished.names)  # a sample counts once for each part
    with progress:
        if done:
            progress.resumed(len(data) * done, data.samples * done, data.tokens * done)
        for number, name in enumerate(goals, 1):
            if name not in finished.names:
                began = time.monotonic()
                _observe(model, state, data, walk, name, progress)
                finished.add(name)
                progress.block(number, len(goals), name, round(time.monotonic() - began, 3))
                give_back_freed()
            convert_some(model, _inside(name, state.targets(model)))
        progress.finished()


def _observe(model: nn.Module, state: FP8State, data: StoredData, walk: Walk, name: str, progress: Progress) -> None:
    """Measure what goes into the modules of one part."""
    config = state.config
    observers = Observers(state.measurements, config.measured, all_experts=config.calibrate_all_experts)
    for target in _inside(name, state.targets(model)):
        target.handler.observe(target, observers)
    observers.watch_masks(model)
    observers.count_experts(model)
    try:
        for batch, sizes in enumerate(data.sizes):
            with observers.only_where(*data.masks[batch], exact=True):
                walk.to(batch, name)
            progress.advanced(1, *sizes)
    finally:
        observers.remove()


def _inside(part: str, targets: list[Target]) -> list[Target]:
    return [target for target in targets if f"{target.name}.".startswith(f"{part}.")]


@contextmanager
def _place_to_keep(config: FP8Config) -> Iterator[Kept]:
    if config.calibration_inputs == "memory":
        yield InMemory()
        return
    os.makedirs(work_folder(config), exist_ok=True)
    for left in glob.glob(os.path.join(glob.escape(work_folder(config)), "inputs-*")):
        with _own(left) as unused:
            if unused:  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="inputs-", dir=work_folder(config)) as folder, _own(folder):
        yield OnDisk(folder)


@contextmanager
def _own(folder: str) -> Iterator[bool]:
    """Have a folder for this process alone; False where another process has it, or that cannot be told."""
    try:
        import fcntl

        place = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owned = True
    except OSError:
        owned = False
    try:
        yield owned
    finally:
        os.close(place)  # which ends the lock, as the end of the process does
