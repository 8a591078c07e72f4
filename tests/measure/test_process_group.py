"""Several processes that measure one model; what they say to each other is tried in real ones by the calibration."""

from __future__ import annotations

import time

import torch.distributed as dist

from optimum_fp8.measure.process_group import processes


def test_one_process_is_one():
    assert processes().leads and processes().count == 1 and processes().agree({"a": 1}) == [{"a": 1}]


def test_waiting_for_others_that_do_not_come_is_said(monkeypatch, caplog):
    monkeypatch.setattr("optimum_fp8.measure.process_group._NOTICE", 0.05)
    monkeypatch.setattr("optimum_fp8.measure.process_group._groups", {})
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "new_group", lambda **options: time.sleep(0.3))
    assert processes().count == 2
    assert "measuring in 2 processes: this one has waited for the others for 0.05 seconds" in caplog.text
    caplog.clear()
    assert processes().count == 2 and not caplog.text, "once they have met there is no waiting"
