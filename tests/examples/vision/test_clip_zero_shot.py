"""Zero-shot classification by the embedded CLIP, in FP8 as in bfloat16."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "vision"))

from clip_zero_shot import main


def test_images_get_the_sentences_that_they_get_in_bfloat16(capsys):
    found = main([])
    accuracy = {name: (found[name] == found["truth"]).float().mean().item() for name in ("bfloat16", "FP8")}
    assert accuracy["bfloat16"] > 0.9 and accuracy["FP8"] >= accuracy["bfloat16"] - 0.01
    assert (found["FP8"] == found["bfloat16"]).float().mean() >= 0.98
    assert "of all parameters in FP8" in capsys.readouterr().out
