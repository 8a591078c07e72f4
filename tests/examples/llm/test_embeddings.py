"""A really pretrained model, all-MiniLM-L6-v2, in FP8: its embeddings and neighbours beside those in float32."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "llm"))


@pytest.mark.slow
def test_embeddings_and_neighbours_are_those_of_float32(capsys):
    from embeddings import main

    rows = main([])
    assert rows["bfloat16"].cosine > 0.9999
    assert rows["FP8"].cosine >= 0.995 and rows["FP8"].worst >= 0.99, rows
    assert rows["FP8"].same >= 0.9 and rows["FP8"].same_if_clear >= 0.99 and rows["FP8"].lost <= 0.001, rows
    assert rows["FP8 weights only"].cosine > rows["FP8"].cosine
    printed = capsys.readouterr().out
    assert "36 of 37 candidate modules in FP8" in printed and "equal to the bit" in printed


@pytest.mark.slow
def test_a_neighbour_that_changes_shows():
    from embeddings import compare

    angles = torch.tensor([0.0, 0.1, 0.25, 1.0])
    expected = torch.stack([angles.cos(), angles.sin()], 1)
    moved = torch.tensor([0.0, 0.1, 0.18, 1.0])  # the second's neighbour is the third now, no longer the first
    row = compare(torch.stack([moved.cos(), moved.sin()], 1), expected)
    assert row.same == 0.75
    lost = torch.tensor(0.1).cos() - torch.tensor(0.15).cos()
    assert row.lost == pytest.approx(lost.item() / 4, abs=1e-6)
    assert row.worst == pytest.approx(torch.tensor(0.07).cos().item(), abs=1e-6)
