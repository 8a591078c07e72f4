"""`optimum-cli fp8 quantize`, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_fp8  # noqa: F401
from optimum_fp8.modules import fp8_modules

ROOT = Path(__file__).parents[2]
TINY_LM = ROOT / "examples" / "llm" / "tiny_lm"


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "optimum-cli"), "fp8", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "fp8"
    dataset = TINY_LM / "calibration.txt"
    options = ["--num-calibration-samples", 4, "--max-seq-length", 64, "--scale-method", "maxabs_pow2"]
    return output, cli("quantize", "--model", TINY_LM, "--dataset", dataset, "--output", output, *options)


@pytest.mark.core
def test_writes_a_complete_checkpoint(quantized):
    output, run = quantized
    assert run.returncode == 0, run.stderr
    assert "28 of 29" in run.stdout and "maxabs_pow2" in run.stdout and "lm_head" in run.stdout
    assert "Calibrating" in run.stderr  # the progress bar
    model = AutoModelForCausalLM.from_pretrained(output)
    assert {module.activations for module in fp8_modules(model).values()} == {"static"}
    ids = AutoTokenizer.from_pretrained(output)("import os", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert not (output / "heldout.txt").exists() and not list(output.parent.glob(".fp8-*"))


def test_config_file_and_flags(tmp_path):
    config = tmp_path / "inc.json"
    config.write_text(json.dumps({"method": "HOOKS", "mode": "QUANTIZE", "scale_method": "UNIT_SCALE"}))
    flags = ["--fp8-config", "e5m2", "--attention", "--kv-cache", "--attention-granularity", "head"]
    run = cli("quantize", "--model", TINY_LM, "--config", config, "--output", tmp_path / "fp8", *flags)
    assert run.returncode == 0, run.stderr
    saved = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert (saved["scale_method"], saved["fp8_config"]) == ("unit_scale", "E5M2")
    assert (saved["attention"], saved["kv_cache"], saved["attention_granularity"]) == (True, True, "head")
    assert "attention in FP8        4 of 4 (products, cache)" in run.stdout


def test_help_lists_the_options():
    run = cli("quantize", "--help")
    assert run.returncode == 0 and all(option in run.stdout for option in ("--model", "--dataset", "--output"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--model": "/no/such/folder"}, "--model '/no/such/folder' is not a folder"),
        ({"--dataset": "no-such-file.txt"}, "--dataset 'no-such-file.txt' is not a file"),
        ({"--scale-method": "maxabs_hv"}, "did you mean 'maxabs_hw'"),
        ({"--target": "gaudi4"}, "did you mean 'gaudi"),
        ({"--config": "no-such-config.json"}, "cannot read the configuration"),
        ({"--activation-scheme": "static"}, "pass --dataset"),
        ({"--modules-to-not-convert": "no_such_module"}, "matches no module"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_are_one_line_without_a_traceback(tmp_path, options, message):
    arguments = {"--model": TINY_LM, "--output": tmp_path / "fp8"} | options
    run = cli("quantize", *(part for pair in arguments.items() for part in pair))
    assert run.returncode == 1
    assert message in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
    assert not (tmp_path / "fp8").exists()


def test_usage_errors_exit_with_2(tmp_path):
    assert cli("quantize", "--model", TINY_LM).returncode == 2


def test_existing_output_is_kept_unless_told(tmp_path, quantized):
    output, _ = quantized
    before = (output / "config.json").read_text()
    arguments = ["--model", TINY_LM, "--output", output, "--activation-scheme", "weight_only"]
    run = cli("quantize", *arguments)
    assert run.returncode == 1 and "--overwrite" in run.stderr and (output / "config.json").read_text() == before
    run = cli("quantize", *arguments, "--overwrite")
    assert run.returncode == 0, run.stderr
    assert json.loads((output / "config.json").read_text())["quantization_config"]["activation_scheme"] == "weight_only"


def test_the_models_own_folder_is_refused(tmp_path):
    run = cli("quantize", "--model", TINY_LM, "--output", TINY_LM, "--overwrite")
    assert run.returncode == 1 and "own folder" in run.stderr and (TINY_LM / "model.safetensors").exists()


def test_a_measuring_config_still_makes_one_whole_run(tmp_path):
    config = tmp_path / "inc.json"
    config.write_text(json.dumps({"mode": "MEASURE", "scale_method": "maxabs_pow2"}))
    dataset = tmp_path / "text.txt"
    dataset.write_text("import os\n" * 20)
    run = cli(
        "quantize", "--model", TINY_LM, "--config", config, "--output", tmp_path / "fp8", "--dataset", dataset
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
