"""The streaming writer: what it writes is what safetensors itself reads, and writes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_fp8.checkpoint.safetensors_writer import DTYPES, SafetensorsWriter, TensorSpec
from optimum_fp8.errors import FP8CheckpointError


def spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def write(path, tensors, metadata=None):
    with SafetensorsWriter(path, {name: spec(each) for name, each in tensors.items()}, metadata or {}) as writer:
        for name, tensor in reversed(tensors.items()):  # any order does
            writer.write(name, tensor)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.core
def test_every_dtype_and_shape_reads_back_to_the_bit(tmp_path):
    bits = torch.arange(0, 192, dtype=torch.int64).to(torch.uint8)
    tensors = {name: bits[: 12 * dtype.itemsize].view(dtype).reshape(3, 4) for name, dtype in DTYPES.items()}
    tensors["BOOL"] = torch.tensor([[True, False, True]])
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7), 'ünï."quoted"': torch.ones(1)}
    tensors |= {"transposed": torch.arange(6.0).view(2, 3).t(), "part": torch.arange(20, dtype=torch.int16)[3:8]}
    write(tmp_path / "a.safetensors", tensors, {"format": "pt", "said": '{"a": "ä"}'})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "said": '{"a": "ä"}'}


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    tensors = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.zeros(2), "c": torch.ones(5).to(torch.float8_e5m2)}
    write(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_file_without_tensors(tmp_path):
    write(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {}


def test_what_is_not_whole_is_not_there(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"before")
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.float32, (2,))}
    lacks = pytest.raises(FP8CheckpointError, match="nothing was written for b")
    with lacks, SafetensorsWriter(tmp_path / "a.safetensors", specs, {}) as writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "a.safetensors", specs, {}) as writer:
        writer.write("a", torch.ones(2))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == b"before"


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(2, dtype=torch.float16), torch.ones(2, 1)])
def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path, tensor):
    specs, refuses = {"a": TensorSpec(torch.float32, (2,))}, pytest.raises(FP8CheckpointError, match=r"a is \(torch")
    with refuses, SafetensorsWriter(tmp_path / "a.safetensors", specs, {}) as writer:
        writer.write("a", tensor)
    assert not list(tmp_path.iterdir())


def test_dtypes_that_safetensors_lacks_are_refused(tmp_path):
    with pytest.raises(FP8CheckpointError, match="a is torch.complex128"):
        SafetensorsWriter(tmp_path / "a.safetensors", {"a": TensorSpec(torch.complex128, (2,))}, {})
