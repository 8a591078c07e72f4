"""`optimum-cli fp8 measure`: the ranges of a model, where they are asked for."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest
from optimum.commands.register.register_fp8 import FP8MeasureCommand
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, Measurements
from optimum_fp8.commands.measure import main
from optimum_fp8.modules import fp8_modules

TINY_LM = Path(__file__).parents[2] / "examples" / "llm" / "tiny_lm"
DATA = ["--dataset", TINY_LM / "calibration.txt", "--num-calibration-samples", 1, "--max-seq-length", 8]


@pytest.fixture
def run(capsys):
    def run(*arguments: object):
        parser = ArgumentParser()
        FP8MeasureCommand.parse_args(parser)
        status = main(parser.parse_args([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.core
def test_what_is_measured_quantizes_the_model(tmp_path, run):
    prefix = tmp_path / "ranges" / "m"
    status, out, err = run("--model", TINY_LM, "--output", prefix, *DATA, "--measure-exclude", "NONE")
    assert status == 0, err
    assert f"{prefix}_measurements.safetensors" in out
    measurements = Measurements.load(prefix)
    assert measurements.samples == 1 and any(kind == "output" for _, kind in measurements.tensors)
    config = FP8Config(mode="QUANTIZE", dump_stats_path=str(prefix))
    model = AutoModelForCausalLM.from_pretrained(TINY_LM, quantization_config=config)
    assert {module.activations for module in fp8_modules(model).values()} == {"static"}
    status, _, err = run("--model", TINY_LM, "--output", prefix, *DATA)
    assert status == 1 and "exists: choose another --output, or pass --overwrite" in err
    assert any(kind == "output" for _, kind in Measurements.load(prefix).tensors), "as it was"
    file = tmp_path / "incs.json"
    file.write_text(json.dumps({"mode": "MEASURE", "allowlist": {"types": [], "names": ["mlp"]}}))
    options = ["--config", file, "--dump-stats-path", prefix, "--overwrite"]
    status, _, err = run("--model", TINY_LM, *options, *DATA)
    assert status == 0 and {name.split(".")[3] for name, _ in Measurements.load(prefix).tensors} == {"mlp"}, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "pass --dataset"),
        ([*DATA, "--mode", "QUANTIZE"], "--mode QUANTIZE does not measure"),
        ([*DATA, "--dump-stats-path", "elsewhere"], "--output and --dump-stats-path 'elsewhere' are the same"),
        ([*DATA, "--model", "/no/such/folder"], "--model '/no/such/folder' is not a folder"),
        ([*DATA, "--observer", "maxbas"], "maxabs"),
    ],
    ids=str,
)
def test_errors_are_one_line(tmp_path, run, options, message):
    status, _, err = run("--model", TINY_LM, "--output", tmp_path / "m", *options)
    assert status == 1 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())
