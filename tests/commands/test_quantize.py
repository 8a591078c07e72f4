"""`optimum-cli fp8 quantize`: one run as a user runs it, and the command called in this process for the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from optimum.commands.register.register_fp8 import FP8QuantizeCommand
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_fp8  # noqa: F401
from optimum_fp8.commands.quantize import main
from optimum_fp8.modules import fp8_modules

ROOT = Path(__file__).parents[2]
TINY_LM = ROOT / "examples" / "llm" / "tiny_lm"
INC = Path(__file__).parents[1] / "data" / "inc"


def parse(*arguments: object):
    parser = ArgumentParser()
    FP8QuantizeCommand.parse_args(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture
def run(capsys):
    """The command in this process: its exit status, output and errors."""

    def run(*arguments: object):
        status = main(parse(*arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def saved_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "fp8"
    program = Path(sys.executable).parent / "optimum-cli"
    options = ["--num-calibration-samples", "4", "--max-seq-length", "64", "--scale-method", "maxabs_pow2"]
    command = [program, "fp8", "quantize", "--model", TINY_LM, "--output", output]
    command += ["--dataset", TINY_LM / "calibration.txt", *options]
    return output, subprocess.run(command, capture_output=True, text=True)


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
    assert (output / "heldout.txt").exists() and not list(output.parent.glob(".fp8-*"))


def test_config_file_and_flags(tmp_path, run):
    config = tmp_path / "inc.json"
    config.write_text(json.dumps({"method": "HOOKS", "mode": "QUANTIZE", "scale_method": "UNIT_SCALE"}))
    flags = ["--fp8-config", "e5m2", "--attention", "--kv-cache", "--attention-granularity", "head"]
    status, out, err = run("--model", TINY_LM, "--config", config, "--output", tmp_path / "fp8", *flags)
    assert status == 0, err
    saved = saved_config(tmp_path / "fp8")
    assert (saved["scale_method"], saved["fp8_config"]) == ("unit_scale", "E5M2")
    assert (saved["attention"], saved["kv_cache"], saved["attention_granularity"]) == (True, True, "head")
    assert "attention in FP8        4 of 4 (products, cache)" in out


def test_flags_win_over_the_file(tmp_path):
    from optimum_fp8.commands.quantize import _fp8_config

    file = tmp_path / "config.json"
    file.write_text(json.dumps({"attention": True, "use_qdq": True, "scale_method": "maxabs_pow2", "batch_size": 2}))
    flags = ["--no-attention", "--batch-size", 4, "--overrides", '{"mlp": {"use_qdq": false}}']
    config = _fp8_config(parse("--model", "m", "--output", "o", "--config", file, *flags))
    assert (config.attention, config.use_qdq, config.batch_size) == (False, True, 4)
    assert (config.scale_method, config.overrides) == ("maxabs_pow2", {"mlp": {"use_qdq": False}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--model": "/no/such/folder"}, "--model '/no/such/folder' is not a folder"),
        ({"--dataset": "no-such-file.txt"}, "dataset='no-such-file.txt' is not a file"),
        ({"--dataset": "./no-such-folder"}, "dataset='./no-such-folder' is not a file"),
        ({"--scale-method": "maxabs_hv"}, "did you mean 'maxabs_hw'"),
        ({"--scale-method": '{"nodes": {}}'}, "scale_method has no 'default'"),
        ({"--overrides": '{"mlp": {"use_qdk": true}}'}, "did you mean 'use_qdq'"),
        ({"--target": "gaudi4"}, "did you mean 'gaudi"),
        ({"--mode": "measure"}, "--mode MEASURE makes no checkpoint"),
        ({"--config": "no-such-config.json"}, "cannot read the configuration"),
        ({"--activation-scheme": "static"}, "pass --dataset"),
        ({"--model": INC / "saved"}, "was written by Intel Neural Compressor"),
        ({"--mode": "QUANTIZE", "--dump-stats-path": INC / "measured" / "measure"}, "of another model"),
        ({"--modules-to-not-convert": "no_such_module"}, "matches no module"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_are_one_line_without_a_traceback(tmp_path, run, options, message):
    arguments = {"--model": TINY_LM, "--output": tmp_path / "fp8"} | options
    status, _, err = run(*(part for pair in arguments.items() for part in pair))
    assert status == 1
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "fp8").exists()


@pytest.mark.parametrize("flags", [[], ["--output", "x", "--overrides", "{"], ["--output", "x", "--batch-size", "two"]])
def test_usage_errors_exit_with_2(flags):
    with pytest.raises(SystemExit) as error:
        parse("--model", TINY_LM, *flags)
    assert error.value.code == 2


def test_existing_output_is_kept_unless_told(quantized, run):
    output, _ = quantized
    before = (output / "config.json").read_text()
    arguments = ["--model", TINY_LM, "--output", output, "--activation-scheme", "weight_only"]
    status, _, err = run(*arguments)
    assert status == 1 and "--overwrite" in err and (output / "config.json").read_text() == before
    status, _, err = run(*arguments, "--overwrite")
    assert status == 0, err
    assert saved_config(output)["activation_scheme"] == "weight_only"


def test_the_models_own_folder_is_refused(run):
    status, _, err = run("--model", TINY_LM, "--output", TINY_LM, "--overwrite")
    assert status == 1 and "own folder" in err and (TINY_LM / "model.safetensors").exists()


@pytest.mark.parametrize("output", ["file/fp8", "file/deep/er/fp8", "/proc/fp8"])
def test_an_output_that_cannot_be_written_is_found_before_weights_are_read(run, tmp_path, monkeypatch, output):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", None)
    status, _, err = run("--model", TINY_LM, "--output", tmp_path / output)
    assert status == 1 and f"--output '{tmp_path / output}' cannot be made" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--activation-scheme", "static"], "pass --dataset"),
        (["--mode", "quantize"], "no measurements at"),
        (["--dataset", "empty.txt"], "dataset='empty.txt' is empty"),
        (["--dataset", "lines.jsonl", "--text-column", "body"], "and none is 'body': set text_column (valid: text)"),
        (["--dataset", "lines.jsonl", "--tokenizer", "./nowhere"], "no tokenizer at './nowhere'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_data_are_looked_at_before_weights_are_read(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "lines.jsonl").write_text('{"text": "import os"}')
    monkeypatch.setattr("transformers.PreTrainedModel._load_pretrained_model", None)
    status, _, err = run("--model", TINY_LM, "--output", tmp_path / "fp8", *options)
    assert status == 1 and message in err.splitlines()[-1]


def test_a_measuring_config_still_makes_one_whole_run(tmp_path, run):
    config = tmp_path / "inc.json"
    config.write_text(json.dumps({"mode": "MEASURE", "scale_method": "maxabs_pow2"}))
    dataset = tmp_path / "text.txt"
    dataset.write_text("import os\n" * 20)
    status, _, err = run(
        "--model", TINY_LM, "--config", config, "--output", tmp_path / "fp8", "--dataset", dataset
    )  # fmt: skip
    assert status == 0, err


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_dataset_is_whatever_the_library_takes_as_a_string(tmp_path, run, kind):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text("code\n" + "import os\n" * 5)
    dataset = tmp_path / "data" if kind == "folder" else tmp_path / "data" / "rows.csv"
    options = ("--dataset", dataset, "--text-column", "code", "--num-calibration-samples", 2)
    status, _, err = run("--model", TINY_LM, "--output", tmp_path / "fp8", *options)
    assert status == 0, err
    assert saved_config(tmp_path / "fp8")["activation_scheme"] == "static"


def summary_lines(out: str) -> dict[str, str]:
    return {line.split("  ")[0].strip(): line for line in out.splitlines()}


def test_the_summary_says_how_much_of_the_model_is_in_fp8(tmp_path, run):
    status, out, err = run("--model", TINY_LM, "--output", tmp_path / "fp8", "--activation-scheme", "dynamic")
    assert status == 0 and "warning: only" not in err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    codes = sum(p.numel() for p in model.parameters() if p.dtype == torch.float8_e4m3fn)
    everything = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("_scale"))
    lines = summary_lines(out)
    assert f"{codes / everything:.1%} of all" in lines["parameters in FP8"]
    assert "28 of 29 candidates" in lines["modules in FP8"]
    kept = lines["kept in high precision"]
    assert "Embedding (" in kept and "kept by default: head, tied or float32" in kept
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    now = sum(t.numel() * t.element_size() for t in tensors)
    assert f"in bfloat16, now {now / 2**20:.1f} MiB" in lines["size"]


def test_a_model_of_which_little_is_in_fp8_is_warned_of(tmp_path, run):
    options = ("--activation-scheme", "dynamic", "--blocklist", '{"names": ["mlp"]}')
    status, out, err = run("--model", TINY_LM, "--output", tmp_path / "fp8", *options)
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: only")]
    assert status == 0 and "of all parameters are in FP8" in warning and "blocklist name 'mlp'" in warning
    assert warning.split()[2] in summary_lines(out)["parameters in FP8"]


def test_the_summary_names_every_format_and_scheme_of_activations(run, tmp_path):
    overrides = {r"mlp\.up_proj$": {"fp8_config": "E5M2", "activation_scheme": "weight_only"}}
    options = ("--activation-scheme", "dynamic", "--target", "cpu", "--overrides", json.dumps(overrides))
    status, out, err = run("--model", TINY_LM, "--output", tmp_path / "fp8", *options)
    assert status == 0, err
    lines = summary_lines(out)
    assert "E4M3 for cpu, E5M2 for cpu" in lines["format"]
    assert "dynamic, weight_only" in lines["activations"]


def test_a_preset_is_a_scheme_and_other_flags_win(run, tmp_path):
    status, out, _ = run("--model", TINY_LM, "--output", tmp_path / "fp8", "--preset", "fp8_dynamic")
    assert status == 0 and "full_range_pcs" in out and "dynamic" in out
    status, out, _ = run(
        *("--model", TINY_LM, "--output", tmp_path / "w8", "--preset", "W8A16", "--activation-scheme", "dynamic")
    )
    assert status == 0 and "dynamic" in out
    status, _, err = run("--model", TINY_LM, "--output", tmp_path / "no", "--preset", "FP9")
    assert status == 1 and "the preset 'FP9' is unknown" in err


def test_a_checkpoint_of_another_maker_is_pointed_to_native_config(run, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(TINY_LM, theirs)
    config = json.loads((theirs / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    status, _, err = run("--model", theirs, "--output", tmp_path / "fp8", "--activation-scheme", "dynamic")
    assert status == 1 and "quant_method='compressed-tensors'" in err and "native_config" in err
