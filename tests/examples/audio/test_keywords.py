"""Classification of sounds by the embedded encoder of Whisper, in FP8 as in bfloat16."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "audio"))

from keywords import main
from tones import NAMES, RATE, sounds


def test_sounds_get_the_classes_that_they_get_in_bfloat16(capsys):
    found = main(["--sounds", "256"])
    accuracy = {name: (found[name] == found["truth"]).float().mean().item() for name in ("bfloat16", "FP8")}
    assert accuracy["bfloat16"] > 0.8 and accuracy["FP8"] >= accuracy["bfloat16"] - 0.01
    assert (found["FP8"] == found["bfloat16"]).float().mean() >= 0.98
    assert "of all parameters in FP8" in capsys.readouterr().out


def test_sounds_of_ones_own(tmp_path):
    for number, (samples, kind) in enumerate(zip(*sounds(40, seed=5), strict=True)):
        path = tmp_path / NAMES[kind] / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    found = main(["--folder", str(tmp_path)])
    assert len(found["truth"]) == 32 and (found["FP8"] == found["truth"]).float().mean() > 0.6
    (tmp_path / "tone").rename(tmp_path / "song")
    with pytest.raises(SystemExit, match="no class 'song'"):
        main(["--folder", str(tmp_path)])
