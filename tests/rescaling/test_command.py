"""`optimum-cli fp8 rescale` and `requantize`."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest
from exporting.conftest import wide_llama
from optimum.commands.register.register_fp8 import FP8RequantizeCommand, FP8RescaleCommand

from optimum_fp8 import FP8Config
from optimum_fp8.rescaling.command import main, main_requantize


def arguments(command, *given):
    parser = ArgumentParser()
    command.parse_args(parser)
    return parser.parse_args([str(each) for each in given])


def test_rescale_says_what_it_wrote_and_what_was_rounded(fp8, tmp_path, capsys):
    source = fp8(FP8Config(activation_scheme="dynamic", scale_method="maxabs_arbitrary", target="gaudi3"))
    given = arguments(
        FP8RescaleCommand, source, "--output", tmp_path / "out", "--target", "gaudi2", "--scale-method", "maxabs_hw"
    )
    assert main(given) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path / 'out'}" in text and "E4M3 for gaudi2, maxabs_hw, dynamic" in text
    assert "modules rounded again  14 of 14" in text and text.count("_proj: ") == 14


def test_from_the_original_nothing_is_rounded_twice(fp8, tmp_path, capsys):
    source = fp8(FP8Config(activation_scheme="dynamic", target="gaudi3"))
    original = tmp_path / "fp8-plain"
    given = arguments(
        FP8RescaleCommand, source, "--output", tmp_path / "out", "--target", "gaudi2", "--original", original
    )
    assert main(given) == 0
    assert f"quantized anew from {original}" in capsys.readouterr().out


def test_requantize_takes_a_preset_and_keys_that_win(fp8, tmp_path, capsys):
    source = fp8(FP8Config.preset("FP8_BLOCK", target="cpu"), wide_llama())
    given = arguments(
        FP8RequantizeCommand, source, "--output", tmp_path / "out", "--preset", "FP8_DYNAMIC", "--target", "gaudi3"
    )
    assert main_requantize(given) == 0
    text = capsys.readouterr().out
    assert "E4M3 for gaudi3, full_range_pcs, dynamic" in text and "largest added error    2." in text


@pytest.mark.parametrize(
    ("run", "command", "more", "message"),
    [
        (main, FP8RescaleCommand, [], "nothing to change"),
        (main, FP8RescaleCommand, ["--scale-method", "maxab_hw"], "maxabs_hw"),
        (main_requantize, FP8RequantizeCommand, ["--preset", "FP9"], "FP9"),
        (main_requantize, FP8RequantizeCommand, [], "nothing to change"),
    ],
)
def test_an_error_is_one_line(run, command, more, message, tmp_path, capsys):
    assert run(arguments(command, tmp_path / "fp8", "--output", tmp_path / "out", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_requantize_lists_the_keys_that_it_takes(capsys):
    with pytest.raises(SystemExit):
        arguments(FP8RequantizeCommand, "--help")
    listed = capsys.readouterr().out
    assert "--scale-method" in listed and "--dataset" in listed and "--percentile" in listed
    assert not any(flag in listed for flag in ("--attention", "--blocklist", "--dump-stats-path", "--mode"))


def test_a_key_that_requantize_does_not_take_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments(FP8RequantizeCommand, tmp_path, "--output", tmp_path / "out", "--kv-cache", "true")
    assert "there is no flag --kv-cache" in capsys.readouterr().err
