"""`optimum-cli fp8 verify`, and `--verify` of other commands."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import pytest
import torch
from optimum.commands.register.register_fp8 import FP8ExportCommand, FP8QuantizeCommand, FP8VerifyCommand
from transformers import AutoModelForCausalLM
from verifying.conftest import UP, edit

from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.verifying.command import check_written, main, verify_written


def test_nothing_wrong(made, capsys):
    assert main(Namespace(folder=str(made["ours"]), against=str(made["base"]))) == 0
    assert capsys.readouterr().out == f"{made['ours']}: nothing wrong was found\n"
    assert verify_written(str(made["compressed-tensors"]), "a/name/on/the/hub") == 0


def test_what_is_wrong_is_printed_line_by_line(copied, capsys):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors[f"{UP}.weight_scale"].zero_(), {"format": "pt"})
    assert main(Namespace(folder=str(folder), against=None)) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"error: {UP}.weight_scale: found [0.0]") and last == f"{folder}: 1 error, 0 warnings"


def test_a_folder_that_is_none(tmp_path, capsys):
    assert main(Namespace(folder=str(tmp_path / "no"), against=None)) == 1
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_written_is_compared_with_the_model_in_memory(made, capsys):
    model = AutoModelForCausalLM.from_pretrained(made["ours"])
    check_written(model, str(made["ours"]))
    assert "nothing wrong was found" in capsys.readouterr().out
    with torch.no_grad():
        model.get_submodule(UP).weight_scale.mul_(2)
    with pytest.raises(FP8CheckpointError, match="is not what the model in memory is"):
        check_written(model, str(made["ours"]))
    out = capsys.readouterr().out
    assert f"error: {UP}.weight_scale: found other values" in out and "the logits of a prompt of 3 tokens" in out


def run(command, *arguments: object) -> int:
    """A command of `optimum-cli` in this process, as a user gives it; its exit status."""
    parser = ArgumentParser()
    command.parse_args(parser)
    with pytest.raises(SystemExit) as ended:
        command.run(SimpleNamespace(args=parser.parse_args([str(argument) for argument in arguments])))
    return ended.value.code


def test_other_commands_verify_what_they_wrote(made, tmp_path, capsys):
    flags = ("--activation-scheme", "weight_only", "--without-model", "--verify")
    assert run(FP8QuantizeCommand, "--model", made["base"], "--output", tmp_path / "files", *flags) == 0
    assert run(FP8ExportCommand, "--model", made["ours"], "--output", tmp_path / "exported", "--verify") == 0
    assert run(FP8VerifyCommand, tmp_path / "exported", "--against", made["base"]) == 0
    out = capsys.readouterr().out
    for folder in ("files", "exported"):
        assert f"{tmp_path / folder}: nothing wrong was found" in out


@pytest.mark.slow
def test_quantize_compares_with_the_model_it_made(made, tmp_path, capsys):
    flags = ("--activation-scheme", "weight_only", "--verify")
    assert run(FP8QuantizeCommand, "--model", made["base"], "--output", tmp_path / "fp8", *flags) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'fp8'}: nothing wrong was found" in out and "modules in FP8" in out
