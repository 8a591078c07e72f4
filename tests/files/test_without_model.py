"""quantize_files: what it refuses before it reads a weight, and what stands beside the weights."""

from __future__ import annotations

import logging
import os

import pytest
from files.conftest import DYNAMIC, WEIGHT_ONLY, contents, said
from hf.conftest import llama
from transformers import LlamaForCausalLM

from optimum_fp8 import FP8Config, quantize_files
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError

CONFIG = FP8Config(**WEIGHT_ONLY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activation_scheme": "static"},
            "activation_scheme: static scales need calibration data and therefore",
        ),
        (DYNAMIC | {"overrides": {"mlp": {"activation_scheme": "static"}}}, r"overrides\['mlp'\]: static scales need"),
        ({"dataset": "words.txt"}, "dataset needs the model"),
        ({"mode": "MEASURE"}, "mode='MEASURE' is about measurements"),
        ({"mode": "QUANTIZE"}, "mode='QUANTIZE' is about measurements"),
        (DYNAMIC | {"attention": True}, "attention in FP8 has scales of its own"),
        ({"dequantize": True}, "dequantize needs the model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_needs_the_model_is_refused(save, tmp_path, options, message):
    source = save(llama())
    with pytest.raises(FP8NotAvailableError, match=f"{message}.*'weight_only', or .*from_pretrained"):
        quantize_files(source, tmp_path / "fp8", FP8Config(**options))
    assert not list(tmp_path.glob("fp8*"))


def test_what_is_no_config_is_refused(save, tmp_path):
    with pytest.raises(FP8ConfigError, match="expected an FP8Config"):
        quantize_files(save(llama()), tmp_path / "fp8", {"activation_scheme": "dynamic"})


def test_the_default_is_dynamic_and_said_where_it_was_left_open(save, tmp_path, caplog):
    source = save(llama())
    quantize_files(source, tmp_path / "a")
    with caplog.at_level(logging.WARNING, "optimum_fp8"):
        quantize_files(source, tmp_path / "b", FP8Config())
    assert "activations are scaled dynamically" in caplog.text
    assert said(tmp_path / "a")["quantization_config"]["activation_scheme"] == "dynamic"
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_source_is_never_written_to(save, tmp_path):
    source = save(llama())
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    for same in (source, f"{source}{os.sep}", tmp_path / "link"):
        with pytest.raises(FP8ConfigError, match="is the source itself"):
            quantize_files(source, same, CONFIG, overwrite=True)
    quantize_files(source, tmp_path / "elsewhere", CONFIG)
    quantize_files(source, tmp_path / "model" / "fp8", CONFIG)  # a folder in it is none of its own
    inside = {name: data for name, data in contents(source).items() if not name.startswith("fp8/")}
    assert inside == before
    assert contents(tmp_path / "model" / "fp8") == contents(tmp_path / "elsewhere")


def test_an_output_that_is_there(save, tmp_path):
    source = save(llama())
    (tmp_path / "fp8").mkdir()
    quantize_files(source, tmp_path / "fp8", CONFIG)  # an empty folder is no obstacle
    whole = contents(tmp_path / "fp8")
    with pytest.raises(FP8ConfigError, match="exists: choose another folder"):
        quantize_files(source, tmp_path / "fp8", CONFIG)
    (tmp_path / "fp8" / "old.txt").write_text("old")
    quantize_files(source, tmp_path / "fp8", CONFIG, overwrite=True)
    assert contents(tmp_path / "fp8") == whole
    (tmp_path / "file").write_text("")
    with pytest.raises(FP8ConfigError, match="cannot be made"):
        quantize_files(source, tmp_path / "file" / "fp8", CONFIG)


def test_what_stands_beside_the_weights_goes_along(save, tmp_path, tokenizer):
    source = save(llama())
    tokenizer.save_pretrained(source)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"weights of another format")
    (tmp_path / "model" / "extra").mkdir()
    (tmp_path / "model" / "extra" / "notes.txt").write_text("notes")
    LlamaForCausalLM.from_pretrained(source, quantization_config=CONFIG).save_pretrained(tmp_path / "with")
    report = quantize_files(source, tmp_path / "fp8", CONFIG)
    found, written = contents(tmp_path / "fp8"), contents(tmp_path / "with")
    assert found.keys() == written.keys() | {"tokenizer.json", "tokenizer_config.json", "extra/notes.txt"}
    assert all(found[name] == data for name, data in written.items() if name.endswith(".json"))
    assert report.output == str(tmp_path / "fp8") and set(report.kept) == {"lm_head"} and not report.by_name
    assert oct((tmp_path / "fp8").stat().st_mode)[-3:] == "755"
