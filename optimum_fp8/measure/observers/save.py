"""The observer "save": writes every tensor that it sees to a file of its own, besides measuring as "maxabs" does."""

from __future__ import annotations

import os
import re
from itertools import count

import torch
from safetensors.torch import save_file

from ...errors import FP8MeasurementError
from ..observer import Observer, register_observer
from .maxabs import MaxAbs


@register_observer
class Save(MaxAbs):
    """`<folder>/<module>_<kind>_iter<k>.safetensors` with one tensor, called as its kind, as often as one is seen.

    Padding is left out, as from the ranges. Numbers go on from the files that are there: none is written over. A file
    appears under its name when it is whole.
    """

    name = "save"
    not_mergeable = "each of them writes its own files; measure all data in one run, or with observer='maxabs'"

    @classmethod
    def from_range(cls, maxabs: torch.Tensor, count: int) -> Observer | None:
        return None

    def update(self, x: torch.Tensor) -> None:
        super().update(x)
        self._write(x)

    def update_per_head(self, x: torch.Tensor) -> None:
        super().update_per_head(x)
        self._write(x)

    def _write(self, x: torch.Tensor) -> None:
        context = self.context
        if context.folder is None:
            raise FP8MeasurementError("observer='save' has no folder to write to: prepare the model with FP8Config")
        os.makedirs(context.folder, exist_ok=True)
        name = re.sub(r"[^\w.-]", "_", f"{context.module or 'model'}_{context.kind}")
        path, unfinished = self._reserve(os.path.join(context.folder, name))
        try:
            metadata = {"module": context.module, "kind": context.kind}
            save_file({context.kind: x.detach().cpu().contiguous()}, unfinished, metadata)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
        self._next += 1

    _next = 0

    def _reserve(self, start: str) -> tuple[str, str]:
        """The next path that is free, and an empty file beside it that keeps other processes from taking it."""
        for number in count(self._next):
            path = f"{start}_iter{number}.safetensors"
            unfinished = f"{path}.unfinished"
            try:
                os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                continue
            if not os.path.exists(path):
                self._next = number
                return path, unfinished
            os.unlink(unfinished)
        raise AssertionError("numbers do not end")
