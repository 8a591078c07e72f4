"""save with verify=True: a fresh process finds what is in memory, or the save is an error."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM
from verifying.conftest import UP, changed

from optimum_fp8 import FP8CheckpointError, FP8Config, FP8NotAvailableError, convert, save
from optimum_fp8.verifying import saving
from optimum_fp8.verifying.finding import error, warning


@pytest.fixture
def model():
    torch.manual_seed(0)
    return convert(tiny_llama().bfloat16(), FP8Config(activation_scheme="dynamic"))


def test_errors_are_raised_and_warnings_logged(model, tmp_path, monkeypatch, caplog):
    asked = []

    def findings(folder, model):
        asked.append((folder, model))
        wrong = [error(f"tensor {number}", "one", "another", "save again") for number in range(6)]
        return [*wrong, warning("a file", "one", "none", "remove it")]

    monkeypatch.setattr(saving, "findings_of", findings)
    with pytest.raises(FP8CheckpointError, match="was written, but is not .*tensor 0: .*tensor 3: .*; and 2 more$"):
        save(model, tmp_path / "fp8", verify=True)
    assert asked == [(tmp_path / "fp8", model)] and "warning: a file" in caplog.text
    save(model, tmp_path / "unchecked")
    assert len(asked) == 1


@pytest.mark.slow
def test_what_was_written_is_checked_in_a_fresh_process(model, tmp_path, monkeypatch):
    save(model, tmp_path / "sound", verify=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "sound")

    def twice_as_large(model, folder, **more):
        write(model, folder, **more)
        changed(folder, f"{UP}.weight_scale", lambda scale: 2 * scale)

    write = saving.write
    monkeypatch.setattr(saving, "write", twice_as_large)
    with pytest.raises(FP8CheckpointError, match=rf"was written, but is not .*{UP}\.weight_scale"):
        save(model, tmp_path / "wrong", verify=True)
    assert (tmp_path / "wrong" / "config.json").is_file()


def test_other_models_are_refused_before_anything_is_written(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    convert(model, FP8Config(activation_scheme="dynamic"))
    with pytest.raises(FP8NotAvailableError, match="expected a model of transformers .*; verify=False"):
        save(model, tmp_path / "module", verify=True)
    assert not (tmp_path / "module").exists()
    save(model, tmp_path / "module")
