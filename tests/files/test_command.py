"""`optimum-cli fp8 quantize --without-model`."""

from __future__ import annotations

import pytest
from commands.test_quantize import TINY_LM, parse
from files.conftest import contents, tensors
from optimum.commands.register.register_fp8 import FP8QuantizeCommand
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, quantize_files
from optimum_fp8.commands.quantize import main as quantize_main
from optimum_fp8.files.command import main


@pytest.mark.slow
def test_the_command_hands_over_its_flags(tmp_path, capsys):
    flags = ["--without-model", "--workers", "2", "--share-scales", "--activation-scheme", "dynamic"]
    command = FP8QuantizeCommand.__new__(FP8QuantizeCommand)
    command.args = parse("--model", TINY_LM, "--output", tmp_path / "fp8", *flags)
    with pytest.raises(SystemExit) as ended:
        command.run()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "modules in FP8          28 of 29 candidates" in out and "the class of the model" in out
    quantize_files(TINY_LM, tmp_path / "called", FP8Config(activation_scheme="dynamic"), share_scales=True)
    assert contents(tmp_path / "fp8") == contents(tmp_path / "called")


def test_the_summary_tells_what_stays_and_why(tmp_path, capsys):
    options = ["--without-model", "--scale-method", "maxabs_pow2", "--activation-scheme", "weight_only"]
    assert main(parse("--model", TINY_LM, "--output", tmp_path / "fp8", *options)) == 0
    out, err = capsys.readouterr()
    assert "info: model.safetensors: 28 weights in FP8, 4.2 MB" in err
    assert "28 of 29 candidates" in out and "lm_head (kept by default: head, tied or float32)" in out
    model = AutoModelForCausalLM.from_pretrained(
        TINY_LM, quantization_config=FP8Config(scale_method="maxabs_pow2", activation_scheme="weight_only")
    )
    model.save_pretrained(tmp_path / "with")
    assert tensors(tmp_path / "fp8") == tensors(tmp_path / "with")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--activation-scheme", "static"], "static scales need calibration data and therefore the model"),
        (["--workers", "0"], "workers=0: expected a whole number from 1"),
        (["--model", "/no/such/folder"], "'/no/such/folder' is not a folder"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, options, message):
    assert main(parse("--model", TINY_LM, "--output", tmp_path / "fp8", "--without-model", *options)) == 1
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1] and "Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--workers", "2"], ["--share-scales"]])
def test_flags_that_go_with_it_are_refused_alone(tmp_path, capsys, flags):
    assert quantize_main(parse("--model", TINY_LM, "--output", tmp_path / "fp8", *flags)) == 1
    assert "go with --without-model" in capsys.readouterr().err


def test_an_interrupted_run_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    from optimum_fp8.files import shards

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_shard", interrupt)
    flags = ["--without-model", "--activation-scheme", "dynamic"]
    assert main(parse("--model", TINY_LM, "--output", tmp_path / "fp8", *flags)) == 130
    assert f"{tmp_path / 'fp8'}.partial; the same command goes on" in capsys.readouterr().err
