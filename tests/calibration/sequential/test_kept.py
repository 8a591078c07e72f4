"""Tensors that wait between two uses are what they were, whatever becomes of those that were put and got."""

from __future__ import annotations

import pytest
import torch

from optimum_fp8.calibration.sequential.kept import InMemory, OnDisk


@pytest.fixture(params=["memory", "disk"])
def kept(request, tmp_path):
    return InMemory() if request.param == "memory" else OnDisk(str(tmp_path))


def test_values_stay(kept, tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = [whole, whole[:, 1:3], whole.T, torch.tensor(3), torch.zeros(0, 2), whole > 5, whole.bfloat16()]
    expected = [tensor.clone() for tensor in tensors]
    kept.put(("batch", 0), tensors)
    whole.zero_()
    for _ in range(2):
        found = kept.get(("batch", 0))
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        found[0].fill_(7)


def test_what_is_dropped_leaves_nothing(kept, tmp_path):
    kept.put("a", [torch.zeros(3)])
    kept.put("a", [torch.ones(3)])
    kept.put("b", [])
    assert torch.equal(kept.get("a")[0], torch.ones(3)) and kept.get("b") == []
    kept.drop("a")
    kept.drop("b")
    kept.drop("c")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError):
        kept.get("a")
