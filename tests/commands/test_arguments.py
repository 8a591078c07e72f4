"""Arguments that are wrong are explained in one line, with what was probably meant."""

from argparse import ArgumentParser

import pytest
from optimum.commands.register.register_fp8 import FP8QuantizeCommand

COMPLETE = ["--model", "m", "--output", "o"]


def parser() -> ArgumentParser:
    """`optimum-cli fp8 quantize` as optimum makes it: a parser below others."""
    top = ArgumentParser(prog="optimum-cli")
    FP8QuantizeCommand.parse_args(top.add_subparsers().add_parser("quantize"))
    return top


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([*COMPLETE, "--scale-metod", "maxabs_hw"], ["no flag --scale-metod", "did you mean '--scale-method'"]),
        ([*COMPLETE, "--scale-metod=maxabs_hw"], ["no flag --scale-metod:", "did you mean '--scale-method'"]),
        ([*COMPLETE, "--scale_method", "maxabs_hw"], ["no flag --scale_method", "did you mean '--scale-method'"]),
        (["--mdoel", "m", "--output", "o"], ["no flag --mdoel", "did you mean '--model'"]),
        ([*COMPLETE, "--no-atention"], ["no flag --no-atention", "did you mean '--no-attention'"]),
        ([*COMPLETE, "--overwite"], ["no flag --overwite", "did you mean '--overwrite'"]),
        ([*COMPLETE, "--overrides", "{mlp: 1}"], ["argument --overrides: '{mlp: 1}' is not JSON"]),
        ([*COMPLETE, "--blocklist", "lm_head"], ["argument --blocklist: 'lm_head' is not JSON"]),
        ([*COMPLETE, "--batch-size", "two"], ["argument --batch-size", "'two'"]),
        (["--model", "m"], ["required: --output"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_one_line_says_what_is_wrong(arguments, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["quantize", *arguments])
    written = capsys.readouterr().err
    assert stop.value.code == 2 and written.count("\n") == 1 and "usage:" not in written
    assert all(part in written for part in parts) and "optimum-cli quantize --help" in written


def test_what_is_right_is_taken_as_before():
    arguments = [*COMPLETE, "--overrides", '{"--x": {"use_qdq": true}}', "--batch", "2", "--no-attention"]
    found = parser().parse_args(["quantize", *arguments])
    assert (found.overrides, found.batch_size, found.attention) == ({"--x": {"use_qdq": True}}, 2, False)
