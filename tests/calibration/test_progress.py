"""What a calibration tells while it runs: a bar, lines in the log, and JSON lines in a file."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration import progress, resume
from optimum_fp8.calibration.progress import Progress
from optimum_fp8.errors import FP8ConfigError

KEYS = {
    *("time", "event", "samples", "of", "batches", "tokens", "tokens_per_second", "seconds", "eta_seconds"),
    *("rss_bytes", "device_bytes"),
}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "calibration.jsonl"


def test_speed_and_time_left(log):
    clock = Clock()
    with Progress(FP8Config(num_calibration_samples=40, calibration_log=str(log)), clock=clock) as told:
        for _ in range(5):
            clock.now += 2.0
            told.advanced(1, 2, 500)
        assert (told.samples, told.batches, told.tokens) == (10, 5, 2500)
        assert told.tokens_per_second == 250.0 and told.seconds_left == 30.0
        assert re.fullmatch(
            r"calibrated 10 of 40 samples \(25%\), 00:30 left, 250 tokens/s, \d+\.\d\d GB RAM", str(told)
        )
        told.finished()
    found = lines(log)
    assert [line["event"] for line in found] == ["start", "progress", "progress", "finished"], "at every tenth"
    assert all(line.keys() == KEYS for line in found)
    assert [line["samples"] for line in found] == [0, 4, 8, 10]
    assert found[-1]["of"] == 10 and found[-1]["eta_seconds"] == 0 and found[1]["eta_seconds"] == 36.0
    assert 10e6 < found[-1]["rss_bytes"] < 1e12


def test_what_was_done_before_is_not_speed(log):
    clock = Clock()
    with Progress(FP8Config(num_calibration_samples=100, calibration_log=str(log)), clock=clock) as told:
        clock.now += 50.0  # making the batches that are skipped
        told.resumed(30, 60, 6000)
        clock.now += 10.0
        told.advanced(1, 20, 2000)
        assert told.tokens_per_second == 200.0 and told.seconds_left == 10.0
    assert [(line["event"], line["samples"]) for line in lines(log)] == [
        ("start", 0),
        ("resumed", 60),
        ("progress", 80),
    ]


def test_a_line_in_the_log_now_and_then(caplog):
    clock = Clock()
    with caplog.at_level(logging.INFO), Progress(FP8Config(num_calibration_samples=10**6), clock=clock) as told:
        for _ in range(90):
            clock.now += 1.0
            told.advanced(1, 1, 10)
    assert len(caplog.records) == 3, "every 30 seconds, where a tenth takes longer"
    assert "calibrated 90 of 1000000 samples" in caplog.records[-1].message


def test_blocks(log, caplog):
    with caplog.at_level(logging.INFO), Progress(FP8Config(calibration_log=str(log))) as told:
        told.block(2, 12, "model.layers.1")
    assert "calibrated block 2 of 12 (model.layers.1)" in caplog.text
    assert lines(log)[-1].items() >= {"event": "block", "block": 2, "blocks": 12, "name": "model.layers.1"}.items()


def test_only_one_of_several_processes_tells(log, caplog, capsys):
    with caplog.at_level(logging.INFO), Progress(FP8Config(calibration_log=str(log)), shown=False) as told:
        told.advanced(1, 128, 10)
        told.finished()
    assert not log.exists() and not caplog.records and capsys.readouterr().err == ""


def test_a_log_that_cannot_be_written(tmp_path, log, caplog):
    with pytest.raises(FP8ConfigError, match="calibration_log=.*expected the path of a file in a folder that is there"):
        Progress(FP8Config(calibration_log=str(tmp_path / "no" / "log"))).__enter__()
    with Progress(FP8Config(num_calibration_samples=1, calibration_log=str(log))) as told:
        log.unlink()
        log.mkdir()
        told.advanced(1, 1, 0)
        told.finished()
    assert caplog.text.count("calibration goes on without it") == 1


def test_a_calibration_tells_all_of_it(log, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resume, "INTERVAL", 0.0)
    monkeypatch.setattr(progress, "_LINE_EACH_SHARE", 0.5)
    keys = {"calibration_log": str(log), "dump_stats_path": str(tmp_path / "ranges"), "num_calibration_samples": 4}
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        calibrate(prepare(model, FP8Config(dataset=[torch.ones(2, 4)] * 2, **keys)))
    events = [line["event"] for line in lines(log)]
    expected = ["start", "progress", "saved", "progress", "saved", "finished", "judged"]
    assert events == [*expected, "start", "resumed", "finished", "judged"]
    assert lines(log)[2]["path"] == str(tmp_path / "ranges_partial.safetensors")
    assert "4/4" in capsys.readouterr().err
