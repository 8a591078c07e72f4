"""Tensors in files: the same values, each with a storage of its own, and an error where there is no room."""

from __future__ import annotations

import copy
import errno
import os
import pickle

import pytest
import torch

from optimum_fp8.calibration import FileMemory
from optimum_fp8.errors import FP8CalibrationError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_same_values(tmp_path, dtype):
    memory = FileMemory(str(tmp_path / "new" / "folder"))
    tensors = [torch.randn(300, 257 + n).to(dtype) for n in range(3)]
    kept = [memory.keep(tensor) for tensor in tensors]
    for tensor, found in zip(tensors, kept, strict=True):
        assert found.dtype == dtype and found.shape == tensor.shape and found.data_ptr() != tensor.data_ptr()
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
        assert found.untyped_storage().nbytes() == tensor.nbytes, "or saving takes them for parts of one tensor"
    assert len({found.untyped_storage().data_ptr() for found in kept}) == 3
    assert os.listdir(tmp_path / "new" / "folder") == [], "the files have no names"


def test_small_tensors_stay(tmp_path):
    small = torch.randn(64)
    assert FileMemory(str(tmp_path / "new")).keep(small) is small and not (tmp_path / "new").exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_a_copy_has_files_of_its_own(tmp_path, copied):
    memory = FileMemory(str(tmp_path))
    kept = memory.keep(torch.ones(2**16))
    copied(memory).keep(torch.zeros(2**16))
    assert torch.equal(kept, torch.ones(2**16))


def test_no_room(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FP8CalibrationError, match=r"no room for 256 MiB.*No space left.*dump_stats_path"):
        FileMemory(str(tmp_path)).keep(torch.zeros(2**16))
