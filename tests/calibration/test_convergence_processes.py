"""What "auto" decides, and what is said of the data: alike for any number of processes, and after an interruption."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from ranks import succeed
from torch import nn

from optimum_fp8 import FP8Config, calibrate, finalize_calibration, prepare, range_movement
from optimum_fp8.errors import FP8CalibrationError

BODY = """
import json, logging
import torch
from moe_models import tiny_moe
from optimum_fp8 import FP8Config, calibrate, finalize_calibration, prepare, range_movement

said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
for name in ("convergence", "run"):
    logger = logging.getLogger(f"optimum_fp8.calibration.{name}")
    logger.addHandler(Keep())
    logger.setLevel("INFO")

def measured(model, dataset, **keys):
    prepare(model, FP8Config(dataset=dataset, **keys))
    calibrate(model)
    return finalize_calibration(model)

torch.manual_seed(0)
plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
images = [torch.rand(1, 4) for _ in range(200)]
stopped = measured(plain, images, num_calibration_samples="auto", dump_stats_path="auto")
experts = tiny_moe("mixtral")
ids = [{"input_ids": torch.randint(1, 64, (1 + n % 2, 5))} for n in range(6)]
found = measured(experts, ids + ids[:1], min_tokens_per_module=40, dump_stats_path="experts")
result = {
    "samples": stopped.samples,
    "moved": range_movement(plain),
    "tokens": {name: tokens.tolist() for name, tokens in found.tokens_of_experts().items()},
}
json.dump(result, open(f"found{rank}.json", "w"))
json.dump(said, open(f"said{rank}.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def ran(folder: Path, count: int) -> Path:
    results = folder / str(count)
    if not results.exists():
        results.mkdir()
        succeed(BODY, count, results)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_decides_alike(folder, count):
    one, many = ran(folder, 1), ran(folder, count)
    expected, said = json.loads((one / "found0.json").read_text()), json.loads((one / "said0.json").read_text())
    assert 32 <= expected["samples"] < 200 and expected["moved"]
    assert sum(*expected["tokens"].values()) == 2 * 5 * 10
    assert [word in line for word, line in zip(("auto", "tokens only", "same as", "experts got"), said, strict=False)]
    for rank in range(count):
        assert json.loads((many / f"found{rank}.json").read_text())["samples"] == expected["samples"]
        assert json.loads((many / f"found{rank}.json").read_text())["moved"] == expected["moved"], "each knows it"
    assert json.loads((many / "said0.json").read_text()) == said
    assert all(json.loads((many / f"said{rank}.json").read_text()) == [] for rank in range(1, count)), "one tells"
    for name in ("auto", "experts"):
        file = f"{name}_measurements.safetensors"
        assert (one / file).read_bytes() == (many / file).read_bytes()


def calibrated(folder, images, calls=None, **keys):
    """A model calibrated on images, with at most so many calls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    keys = {"num_calibration_samples": "auto", "dump_stats_path": str(folder / "measure"), **keys}
    prepare(model, FP8Config(dataset=images, **keys))
    if calls is not None:
        left = [None] * calls
        model.register_forward_pre_hook(lambda *_: left.pop())
    calibrate(model)
    return model


def save_each_batch(monkeypatch):
    monkeypatch.setattr("optimum_fp8.calibration.resume.INTERVAL", 0)
    monkeypatch.setattr("optimum_fp8.calibration.resume._LITTLE", 1e9)


@pytest.mark.parametrize("broken_off", [3, 20, 40])
def test_a_calibration_that_was_broken_off_decides_as_if_it_had_not_been(tmp_path, monkeypatch, caplog, broken_off):
    caplog.set_level(logging.INFO, "optimum_fp8.calibration")
    images = [torch.rand(1, 4) for _ in range(200)]
    images[30] = images[2]
    whole = calibrated(tmp_path / "whole", images)
    said = [record.getMessage() for record in caplog.records if "samples" in record.getMessage()][-2:]
    assert "samples are enough" in said[0] and said[1].startswith("1 of ")
    expected = finalize_calibration(whole)
    assert broken_off < expected.samples < 200

    save_each_batch(monkeypatch)
    with pytest.raises(FP8CalibrationError):
        calibrated(tmp_path / "parts", [*images[:broken_off], torch.rand(1, 5), *images[broken_off:]])
    model = calibrated(tmp_path / "parts", images, calls=expected.samples - broken_off)
    assert [record.getMessage() for record in caplog.records if "samples" in record.getMessage()][-2:] == said
    assert range_movement(model) == range_movement(whole)
    assert finalize_calibration(model).encoded() == expected.encoded()


def test_after_auto_more_can_be_asked_for(tmp_path, monkeypatch):
    """What "auto" found to be enough does not end a calibration with a number of samples."""
    save_each_batch(monkeypatch)
    images = [torch.rand(1, 4) for _ in range(200)]
    calibrated(tmp_path, images)
    model = calibrated(tmp_path, images, num_calibration_samples=150)
    assert finalize_calibration(model).samples == 150


def test_the_log_has_what_was_said(tmp_path):
    log = tmp_path / "log.jsonl"
    calibrated(
        tmp_path, [torch.rand(1, 4) for _ in range(20)] * 2, num_calibration_samples=40, calibration_log=str(log)
    )
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["event"] == "judged" and last["movement"].startswith("over the last ")
    assert last["warnings"] == [
        "20 of 40 calibration samples were the same as an earlier one, which adds nothing to the ranges: use as many "
        "different ones"
    ]
