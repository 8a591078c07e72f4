"""`optimum-cli fp8 merge-lora`."""

from argparse import ArgumentParser, Namespace

import pytest
from adapters.conftest import llama
from optimum.commands.register.register_fp8 import FP8MergeLoraCommand

from optimum_fp8.adapters.command import main


def arguments(*args):
    parser = ArgumentParser()
    FP8MergeLoraCommand.parse_args(parser)
    return parser.parse_args([str(each) for each in args], Namespace())


def test_writes_a_folder_and_says_what_it_cost(save, adapt, quantized, tmp_path, capsys):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original)
    assert main(arguments(fp8, adapter, "--output", tmp_path / "out", "--trained-on", "base")) == 0
    said = capsys.readouterr().out
    assert "14 weights changed, an adapter trained on base, added to the FP8 weights" in said
    assert "loss: the adapter was trained on the original weights" in said and f"written to {tmp_path / 'out'}" in said
    assert "… and 2 more, with smaller errors" in said
    args = (fp8, adapter, "--output", tmp_path / "other", "--trained-on", "base", "--original", original)
    assert main(arguments(*args)) == 0
    assert "added to the original weights" in (said := capsys.readouterr().out) and "loss:" not in said


def test_an_error_is_one_line(tmp_path, capsys):
    assert main(arguments(tmp_path, tmp_path, "--output", tmp_path / "out", "--trained-on", "fp8")) == 1
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


def test_what_it_was_trained_on_is_required(tmp_path):
    with pytest.raises(SystemExit):
        arguments(tmp_path, tmp_path, "--output", tmp_path / "out")
