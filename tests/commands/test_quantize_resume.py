"""`optimum-cli fp8 quantize` that is broken off goes on, also where only writing the checkpoint went wrong."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser
from pathlib import Path

import pytest
from optimum.commands.register.register_fp8 import FP8QuantizeCommand

from optimum_fp8.calibration import resume
from optimum_fp8.commands import quantize

TINY_LM = Path(__file__).parents[2] / "examples" / "llm" / "tiny_lm"


@pytest.mark.parametrize(
    "error, status", [(OSError("disk full"), 1), (KeyboardInterrupt(), 130)], ids=["full", "Ctrl-C"]
)
def test_a_checkpoint_that_was_not_written_costs_no_second_calibration(tmp_path, monkeypatch, capsys, error, status):
    monkeypatch.setattr(resume, "INTERVAL", 0.0)
    parser = ArgumentParser()
    FP8QuantizeCommand.parse_args(parser)
    words = ["--model", str(TINY_LM), "--output", str(tmp_path / "fp8"), "--dataset", str(TINY_LM / "calibration.txt")]
    words += [
        "--num-calibration-samples",
        "2",
        "--max-seq-length",
        "32",
        "--calibration-log",
        str(tmp_path / "log.jsonl"),
    ]
    arguments = parser.parse_args([*words, "--dump-stats-path", str(tmp_path / "ranges")])

    def fails(*args):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(quantize, "_save", fails)
        assert quantize.main(arguments) == status
    assert os.path.exists(tmp_path / "ranges_partial.safetensors")
    assert "a calibration goes on when run again" in capsys.readouterr().err or status == 1
    assert quantize.main(arguments) == 0
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    again = events[[event["event"] for event in events].index("judged") + 1 :]
    assert [event["event"] for event in again] == ["start", "resumed", "finished", "judged"]
    assert again[1]["batches"] == 2
    assert sorted(os.listdir(tmp_path)) == ["fp8", "log.jsonl"], "nothing else is left"
