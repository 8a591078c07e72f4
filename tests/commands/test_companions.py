"""Everything that stands beside a model's weights goes along with the quantized ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_fp8.commands.companions import copy_companions

TINY_LM = Path(__file__).parents[2] / "examples" / "llm" / "tiny_lm"
BESIDE = {
    "README.md": "about",
    "tokenizer.model": "sentences",
    "spiece.vocab": "words",
    "source.spm": "words",
    "modeling_own.py": "code = 1",
    "preprocessor_config.json": "{}",
    "additional_chat_templates/tool.jinja": "{{ x }}",
    "1_Pooling/config.json": "{}",
}
WEIGHTS = [
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    *("model.safetensors.index.fp16.json", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"),
    *("original/consolidated.00.pth", "onnx/model.onnx", "adapter_model.safetensors", "optimizer.pt"),
]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path) -> Path:
    for name in [*BESIDE, *WEIGHTS, ".git/HEAD"]:
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BESIDE.get(name, "weights"))
    return tmp_path / "model"


@pytest.mark.core
def test_all_but_weights_and_their_lists(source, tmp_path, capsys):
    (tmp_path / "fp8").mkdir()
    copy_companions(str(source), str(tmp_path / "fp8"), apart_from=str(tmp_path / "fp8"))
    assert files(tmp_path / "fp8") == set(BESIDE)
    assert {name: (tmp_path / "fp8" / name).read_text() for name in BESIDE} == BESIDE
    assert "not copied: onnx/model.onnx, original/consolidated.00.pth" in capsys.readouterr().err


@pytest.mark.core
def test_what_was_written_for_the_quantized_model_wins(source, tmp_path):
    (source / "config.json").write_text("old")
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "config.json").write_text("new")
    (tmp_path / "fp8" / "README.md").write_text("new")
    copy_companions(str(source), str(tmp_path / "fp8"), apart_from=str(tmp_path / "fp8"))
    assert [(tmp_path / "fp8" / name).read_text() for name in ("config.json", "README.md")] == ["new", "new"]


def test_an_output_inside_of_the_model_is_not_copied_into_itself(source):
    for name in ("fp8", ".fp8-temporary"):
        (source / name).mkdir()
    (source / "fp8" / "earlier.txt").write_text("")
    (source / "back").symlink_to(source)
    copy_companions(str(source), str(source / ".fp8-temporary"), apart_from=str(source / "fp8"))
    assert files(source / ".fp8-temporary") == set(BESIDE)


SCRIPT = """
import sys
from argparse import ArgumentParser
from optimum.commands.register.register_fp8 import FP8QuantizeCommand
from optimum_fp8.commands.quantize import main

parser = ArgumentParser()
FP8QuantizeCommand.parse_args(parser)
raise SystemExit(main(parser.parse_args(sys.argv[1:])))
"""


@pytest.mark.slow
def test_a_model_in_the_cache_of_the_hub(tmp_path):
    repository, commit = tmp_path / "hub" / "models--someone--tiny", "ab" * 20
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    blobs.mkdir()
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "extra/merges.own"]:
        blob = blobs / name.replace("/", "-")
        shutil.copy(TINY_LM / name, blob) if (TINY_LM / name).exists() else blob.write_text("merges")
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    options = ["--model", "someone/tiny", "--output", tmp_path / "fp8", "--activation-scheme", "weight_only"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {"tokenizer.json", "tokenizer_config.json", "extra/merges.own"} < files(tmp_path / "fp8")
    assert not any(path.is_symlink() for path in (tmp_path / "fp8").rglob("*"))
    assert "quantization_config" in json.loads((tmp_path / "fp8" / "config.json").read_text())
