"""The example that compares scale methods, with what an owner of a Gaudi gives it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from optimum_fp8.test_utils import gaudi

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "llm"))

import quantize_llm
from quantize_llm import main


@pytest.mark.slow
def test_a_cpu_shows_what_a_gaudi_computes_with_a_static_cache(capsys, monkeypatch, tmp_path):
    checked = []
    monkeypatch.setattr(quantize_llm, "check_round_trip", lambda model, ids: checked.append(model))
    text = tmp_path / "calibration.txt"
    text.write_text((quantize_llm.TINY_LM / "calibration.txt").read_text()[:12000])
    main(["--target", "gaudi2", "--static-cache", "--windows", "4", "--calibration", str(text)])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("FP8 ") and not line.endswith("writes:")]
    assert len(rows) == 3 and all(0.9 < float(row[4]) < 1.1 for row in rows), out
    config = checked[0].config.quantization_config
    assert (config.target, config.kv_cache) == ("gaudi2", True)


def test_a_gaudi_is_started_before_anything_moves_there():
    """There is none: what is tried after the first call fails, as loading onto a device that is not there does."""
    with gaudi.emulated("gaudi2") as device, pytest.raises(Exception, match="hpu"):
        main(["--device", "hpu"])
    assert device.events == ["hpu_inference_set_env"]
