"""The example trains the embedded vision transformer so that a coarse format costs it little."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples" / "vision"


@pytest.mark.slow
def test_training_closes_most_of_the_gap(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import finetune

    try:
        found = finetune.main(["--output", str(tmp_path / "trained")])
    finally:
        sys.modules.pop("finetune")
    plain, afterwards, in_fp8 = (found[name][0] for name in found)
    assert afterwards > 1.5 * plain, "the format costs something"
    assert afterwards - in_fp8 >= 0.8 * (afterwards - plain)
    assert found["trained in FP8"][1] >= found["quantized afterwards"][1]
    assert "trained in FP8" in capsys.readouterr().out and (tmp_path / "trained" / "config.json").exists()
