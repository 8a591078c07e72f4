"""FileMemory: room for tensors in files without a name, whose pages the system drops and reads again as it needs to.

The files vanish with the last tensor in them, or with the process, however it ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from typing import Any

import torch

from ...errors import FP8CalibrationError

_SEGMENT = 256 * 2**20
_ALIGNED = 64
_SMALL = 64 * 2**10  # bytes of a tensor that is not worth the trouble


class FileMemory:
    """Memory that is backed by files instead of by the machine's own.

    Args:
        folder: on the disk that has the room; it is made where it is not there.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._segment: mmap.mmap | None = None
        self._used = 0

    def __reduce__(self) -> Any:
        """Copies, of a model with its quantizer, begin with no files: a mapping can be neither copied nor pickled."""
        return FileMemory, (self._folder,)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same values in a file; small ones, and those that are not on the CPU, as they are.

        Raises:
            FP8CalibrationError: there is no room for it.
        """
        if tensor.device.type != "cpu" or tensor.nbytes < _SMALL:
            return tensor
        give_back_freed()  # what the tensors before were made of
        self._used = -(-self._used // _ALIGNED) * _ALIGNED
        if self._segment is None or self._used + tensor.nbytes > len(self._segment):
            self._segment, self._used = self._new_segment(max(tensor.nbytes, _SEGMENT)), 0
        # Each has a storage of its own, or code that saves models would take them for parts of one tensor.
        place = torch.frombuffer(self._segment, dtype=torch.uint8, count=tensor.nbytes, offset=self._used)
        self._used += tensor.nbytes
        kept = place.view(tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor.detach())

    def _new_segment(self, size: int) -> mmap.mmap:
        try:
            os.makedirs(self._folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                if hasattr(os, "posix_fallocate"):  # a full disk has to show now: later it would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise FP8CalibrationError(
                f"calibration='sequential' found no room for {size / 2**20:.0f} MiB of the quantized model in "
                f"{self._folder!r} ({error.strerror or error}): set dump_stats_path to a place on a disk that has it"
            ) from None


def give_back_freed() -> None:
    """Have the C library give back to the system what was freed: it keeps it where something small lies in between,
    and may then have no room in it for the next large tensor."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
