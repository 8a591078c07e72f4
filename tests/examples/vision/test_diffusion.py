"""examples/vision/diffusion.py on the embedded pipeline: runs, and tells samples in FP8 from noise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[3] / "examples" / "vision" / "diffusion.py"


def test_samples_in_fp8_stand_beside_those_of_the_original(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--samples", "16", "--steps", "4"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].split() for line in said.splitlines() if line.endswith("%")}
    assert float(said.split("PSNR ")[1].split()[0]) > 20
    assert float(rows["FP8"][0]) < 2 * float(rows["float32"][0])
    assert Image.open(tmp_path / "samples.png").size == (512, 64)


def test_the_distance_is_that_of_normal_distributions():
    frechet_distance = runpy.run_path(str(SCRIPT))["frechet_distance"]
    torch.manual_seed(0)
    x = torch.randn(5000, 3, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # Means 2 apart in one dimension, and twice the deviation in each: 4 + 3 · (2 − 1)².
    assert frechet_distance(x, 2 * x + torch.tensor([2.0, 0, 0])) == pytest.approx(7, rel=0.05)


def test_a_folder_that_is_no_pipeline_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--pipeline", str(tmp_path)])
    with pytest.raises(SystemExit, match="DiffusionPipeline cannot load it") as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "\n" not in str(caught.value)
