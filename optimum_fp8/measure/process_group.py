"""Several processes that measure one model together: what they say to each other, and their measurements as one.

Messages are bytes (JSON, or measurements as they stand in a file) between rank 0 and each of the others, over gloo
whatever the model uses: so it is known which process was lost, and no rank has to guess what the others do next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information

from ..errors import FP8CalibrationError
from .store import Measurements

logger = logging.getLogger(__name__)

# How long a rank waits for another that is alive: as long as a share of the data may take. That one is lost shows at
# once, for its connections are closed.
_PATIENCE = timedelta(hours=2)
_NOTICE = 30.0  # seconds of waiting before there is a first group, after which that is said
_LONGEST = 2000  # characters of an error that others are told


@dataclass(frozen=True)
class Processes:
    """This process among those that measure the same model.

    Attributes:
        rank: which one this is.
        count: how many there are.
        group: over which they speak; None where there is only one.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def agree(self, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each of them says, by rank, the same in all of them; all have to call it at the same place.

        Args:
            said: JSON; an "error" stops all.

        Raises:
            FP8CalibrationError: one of them said an "error" or was lost; the message says which, and why. The one that
                said it goes on, to raise what it was.
        """
        if self.group is None:
            return [dict(said)]
        if self.leads:
            heard = [dict(said), *(self._heard(rank) for rank in range(1, self.count))]
            for rank in range(1, self.count):
                if "lost" not in heard[rank]:
                    self._send(json.dumps(heard).encode(), rank)
        else:
            self._send(json.dumps(said).encode(), 0)
            heard = json.loads(self._receive(0))
        for rank, other in enumerate(heard):
            if rank != self.rank and other.get("error") is not None and said.get("error") is None:
                raise FP8CalibrationError(f"calibration stopped, because rank {rank} did: {other['error']}")
        return heard

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all of them do inside has been done in all of them afterwards: an error in one is an error in all.

        Raises:
            FP8CalibrationError: one of the others had an error, or was lost.
        """
        try:
            yield
        except Exception as error:
            self.stop(error)
            raise
        self.agree({})

    def stop(self, error: Exception) -> None:
        """Tell the others, which `agree` at this place, of an error that this one is about to raise."""
        with suppress(FP8CalibrationError):  # of another that was lost meanwhile
            self.agree({"error": f"{type(error).__name__}: {error}"[:_LONGEST]})

    def merged(self, measurements: Measurements, *, everywhere: bool, parts: bool = False) -> Measurements:
        """Those of all ranks as one, in rank 0 and, where they are wanted `everywhere`, in all; else what was given.

        Args:
            measurements: of this one.
            everywhere: whether all of them are to have the result.
            parts: whether each holds other parts of the weights.

        Raises:
            FP8CalibrationError: one of them was lost.
            FP8MeasurementError: they are of different models.
        """
        if self.group is None:
            return measurements
        if not self.leads:
            self._send(measurements.encoded(), 0)
            return self._decoded(0) if everywhere else measurements
        total = measurements.without_data()
        total.include(measurements)
        for rank in range(1, self.count):
            total.include(self._decoded(rank), parts=parts)
        if everywhere:
            data = total.encoded()
            for rank in range(1, self.count):
                self._send(data, rank)
        return total

    def _decoded(self, rank: int) -> Measurements:
        return Measurements.decoded(self._receive(rank), f"what rank {rank} sent")[0]

    def _heard(self, rank: int) -> dict[str, Any]:
        try:
            said: dict[str, Any] = json.loads(self._receive(rank))
            return said
        except FP8CalibrationError as error:
            return {"error": str(error), "lost": True}

    def _send(self, data: bytes, rank: int) -> None:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            dist.send(torch.tensor([content.numel()]), rank, group=self.group)
            dist.send(content, rank, group=self.group)
        except RuntimeError as error:
            raise _lost(rank, error) from None

    def _receive(self, rank: int) -> bytes:
        try:
            size = torch.zeros(1, dtype=torch.int64)
            dist.recv(size, rank, group=self.group)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(content, rank, group=self.group)
        except RuntimeError as error:
            raise _lost(rank, error) from None
        return content.numpy().tobytes()


def _lost(rank: int, error: RuntimeError) -> FP8CalibrationError:
    reason = str(error).split("] ", 1)[-1].split(". This is")[0].splitlines()[0]
    return FP8CalibrationError(
        f"rank {rank} was lost ({reason}): it was killed, out of memory for example, or ended with an error of its "
        "own: see what it printed, and start again; a calibration with a dataset goes on where it was"
    )


_groups: dict[Any, Any] = {}  # the group to speak over, by the default group


def processes() -> Processes:
    """This process and those that a process group or a launcher (torchrun, accelerate, mpirun) has started with it.

    All of them have to call it at the same place the first time. A process group is made where there is none, as
    accelerate does it.

    Raises:
        FP8CalibrationError: the launcher says that there are others, and they cannot be reached.
    """
    if not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        count = get_cpu_distributed_information().world_size
        if count == 1:
            return Processes()
        _connect(count)
    if dist.get_world_size() == 1:
        return Processes()
    everyone = dist.group.WORLD
    if everyone not in _groups:
        _groups.clear()
        with _said_if_long(dist.get_world_size()):
            _groups[everyone] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size(), _groups[everyone])


@contextmanager
def _said_if_long(count: int) -> Iterator[None]:
    """Warn where others have not come after a while: perhaps they never will."""
    sentence = (
        "measuring in %d processes: this one has waited for the others for %g seconds. All of them have to prepare or "
        "load the model to be measured; to measure in one alone, do so before there is a process group"
    )
    timer = Timer(_NOTICE, logger.warning, (sentence, count, _NOTICE))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _connect(count: int) -> None:
    """Make the process group of a launcher's processes."""
    try:
        PartialState(cpu=not torch.accelerator.is_available())
        reason = (
            "accelerate's state was made before, without them: set ACCELERATE_USE_CPU=true where there are CPUs only"
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error)
    if not dist.is_initialized():
        raise FP8CalibrationError(
            f"this is one of {count} processes, as the environment says, and the others cannot be reached ({reason}): "
            "expected torchrun, accelerate launch or torch.distributed.init_process_group; "
            "to calibrate in one process, start it without a launcher"
        )
