"""`fbgemm_fp8`: a scale for each output and each token."""

import logging

import torch
from foreign_checkpoints import as_stored, check_runs, llama, refusal, write

SAID = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


def with_bound(name, tensors):
    return as_stored(name, tensors) | {f"{name}.input_scale_ub": torch.tensor([1200.0])}


def test_runs(tmp_path, caplog):
    folder = write(tmp_path / "theirs", llama(), "channel", "token", SAID, with_bound)
    with caplog.at_level(logging.WARNING, "optimum_fp8"):
        check_runs(folder, llama(), "channel", "token")
    assert "activation_scale_ub=1200.0" in caplog.text


def test_what_is_not_read_is_named(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "channel", "token", {**SAID, "scheme": "row"})
    assert "'scheme'" in refusal(folder)
    folder = write(tmp_path / "listed", llama(), "channel", "token", {**SAID, "modules_to_not_convert": ["self_attn"]})
    assert "excludes it ('self_attn')" in refusal(folder)
