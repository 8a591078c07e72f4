"""Several processes, runs that are broken off, and weights that cannot be quantized."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from files.conftest import DYNAMIC, WEIGHT_ONLY, contents, said, tensors
from hf.conftest import llama
from safetensors.torch import load_file, save_file

from optimum_fp8 import FP8Config, quantize_files
from optimum_fp8.errors import FP8CheckpointError, FP8ConfigError, FP8ScaleError
from optimum_fp8.files import shards

CONFIG = FP8Config(**DYNAMIC)


@pytest.fixture
def source(save) -> str:
    return save(llama(), max_shard_size="40KB")


def quantize(source, output, config=CONFIG, **options):
    return quantize_files(source, output, config, max_shard_size="20KB", **options)


@pytest.mark.slow
def test_workers_write_the_same_bytes(source, tmp_path):
    quantize(source, tmp_path / "one")
    quantize(source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 3


@pytest.mark.slow
def test_errors_of_workers_are_told(source, tmp_path):
    spoil(source, "model.layers.1.mlp.down_proj.weight", torch.nan)
    with pytest.raises(FP8ScaleError, match=r"model.layers.1.mlp.down_proj.weight in model-.*NaN or Inf"):
        quantize(source, tmp_path / "fp8", workers=2)


class Stop(Exception):
    pass


def breaking_off(monkeypatch, after: int) -> list[str]:
    """Have the run end after so many files; the names of those that are written from now on."""
    written, write = [], shards.write_shard

    def count(path, *args):
        if len(written) == after:
            raise Stop
        written.append(os.path.basename(path))
        return write(path, *args)

    monkeypatch.setattr(shards, "write_shard", count)
    return written


def test_a_run_that_was_broken_off_goes_on(source, tmp_path, monkeypatch, caplog):
    quantize(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        first = breaking_off(patch, 2)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists() and len(first) == 2
    partial = tmp_path / "fp8.partial"
    (partial / "files" / "model-00009.safetensors.77.tmp").write_text("what a killed worker left")
    damaged = partial / "files" / first[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    rest = breaking_off(monkeypatch, 1000)
    with caplog.at_level(logging.INFO, "optimum_fp8"):
        quantize(source, tmp_path / "fp8")
    assert contents(tmp_path / "fp8") == contents(tmp_path / "whole")
    assert first[0] not in rest and first[1] in rest and not partial.exists()
    assert f"1 of {len(rest) + 1} files are there already" in caplog.text
    assert all(f"{name}: " in caplog.text for name in rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": FP8Config(**DYNAMIC, fp8_config="E5M2")}, "config and another files and another schemes"),
        ({"config": FP8Config(**DYNAMIC, weight_backoff=0.5)}, "config"),
        ({"share_scales": True}, "share_scales"),
        ({"source": "touched"}, "source"),
        ({"source": "other"}, "source"),
    ],
    ids=["format", "backoff", "share_scales", "touched", "other"],
)
def test_files_of_another_run_are_not_taken(source, save, tmp_path, monkeypatch, change, message):
    with monkeypatch.context() as patch:
        breaking_off(patch, 2)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "fp8")
    if change.get("source") == "touched":
        file = next(path for path in os.scandir(source) if path.name.endswith(".safetensors"))
        os.utime(file.path, ns=(1, 1))
    place = save(llama(), name="other", max_shard_size="40KB") if change.get("source") == "other" else source
    options = {key: value for key, value in change.items() if key != "source"}
    with pytest.raises(FP8CheckpointError, match=f"unfinished run left, which had another {message}: make"):
        quantize(place, tmp_path / "fp8", **options)
    assert (tmp_path / "fp8.partial").exists()
    quantize(place, tmp_path / "fp8", **options, overwrite=True)
    quantize(place, tmp_path / "again", **options)
    assert contents(tmp_path / "fp8") == contents(tmp_path / "again") and not (tmp_path / "fp8.partial").exists()


def test_a_folder_of_something_else_is_never_removed(source, tmp_path):
    (tmp_path / "fp8.partial").mkdir()
    (tmp_path / "fp8.partial" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FP8CheckpointError, match="fp8.partial is in the way"):
            quantize(source, tmp_path / "fp8", overwrite=overwrite)
    assert (tmp_path / "fp8.partial" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "fp8.partial" / "thesis.txt").rename(tmp_path / "fp8.partial" / ".manifest.json.7.tmp")
    quantize(source, tmp_path / "fp8")  # broken off before anything was written
    assert not (tmp_path / "fp8.partial").exists()


SLOW = """
import sys, time
from optimum_fp8 import FP8Config, quantize_files
from optimum_fp8.files import shards

write = shards.write_shard
def slowly(*args):
    seconds = write(*args)
    time.sleep(0.3)
    return seconds
shards.write_shard = slowly
quantize_files(sys.argv[1], sys.argv[2], FP8Config(activation_scheme="dynamic"), max_shard_size="20KB")
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(source, tmp_path):
    quantize(source, tmp_path / "whole")
    process = subprocess.Popen([sys.executable, "-c", SLOW, source, tmp_path / "fp8"])
    files = tmp_path / "fp8.partial" / "files"
    deadline = time.monotonic() + 100
    while len(list(files.glob("*.safetensors"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "fp8").exists()
    before = {path.name: path.stat().st_mtime_ns for path in files.glob("*.safetensors")}
    assert len(before) >= 2
    quantize(source, tmp_path / "fp8")
    assert contents(tmp_path / "fp8") == contents(tmp_path / "whole")
    kept = [name for name, stamp in before.items() if (tmp_path / "fp8" / name).stat().st_mtime_ns == stamp]
    assert kept == list(before)


def spoil(folder, name: str, value: float) -> None:
    index = said(folder, "model.safetensors.index.json")
    path = os.path.join(folder, index["weight_map"][name])
    found = load_file(path)
    found[name].view(-1)[3] = value
    save_file({key: each.clone() for key, each in found.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [WEIGHT_ONLY, DYNAMIC | {"scale_method": "maxabs_arbitrary"}])
@pytest.mark.parametrize("share", [False, True])
def test_weights_that_are_not_finite_are_named_with_their_file(source, tmp_path, value, options, share):
    spoil(source, "model.layers.0.self_attn.k_proj.weight", value)
    with pytest.raises(FP8ScaleError, match=r"layers.0.self_attn.k_proj.weight in model-\d+-of-\d+.safetensors: .*NaN"):
        quantize(source, tmp_path / "fp8", FP8Config(**options), share_scales=share)
    assert not (tmp_path / "fp8").exists()


def test_a_weight_of_zeros_is_what_the_model_makes_of_it(save, tmp_path):
    model = llama()
    torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    source = save(model)
    type(model).from_pretrained(source, quantization_config=CONFIG).save_pretrained(tmp_path / "with")
    quantize_files(source, tmp_path / "without", CONFIG)
    assert tensors(tmp_path / "without") == tensors(tmp_path / "with")


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2"])
def test_workers_are_counted(source, tmp_path, workers):
    with pytest.raises(FP8ConfigError, match="workers="):
        quantize(source, tmp_path / "fp8", workers=workers)
