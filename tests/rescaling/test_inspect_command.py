"""`optimum-cli fp8 inspect`."""

from __future__ import annotations

import json
from argparse import Namespace

from hf.conftest import llama

from optimum_fp8 import FP8Config, rescale
from optimum_fp8.rescaling import inspect
from optimum_fp8.rescaling.inspect_command import main


def shown(capsys, folder, **options) -> str:
    assert main(Namespace(**{"checkpoint": str(folder), "json": False, **options})) == 0
    return capsys.readouterr().out


def test_a_summary_with_what_was_made_of_what(fp8, batches, tmp_path, capsys):
    folder = fp8(FP8Config(dataset=batches, target="gaudi3", attention=True))
    rescale(folder, tmp_path / "out", target="gaudi2")
    lines = {line.split("  ")[0].strip(): line for line in shown(capsys, tmp_path / "out").splitlines()}
    assert "out (LlamaForCausalLM)" in lines["checkpoint"] and "optimum_fp8" in lines["format"]
    assert "torch" in lines["made with"] and "E4M3 on gaudi2" in lines["scheme"]
    assert "14 in float8_e4m3fn, scaled per tensor from" in lines["weights"]
    assert "source list, samples 8" in lines["data"] and "lm_head (" in lines["in high precision"]
    assert "rescaled: target gaudi2" in lines["since then"]


def test_json_is_what_inspect_returns(fp8, capsys):
    folder = fp8(FP8Config(activation_scheme="dynamic", target="cpu"))
    assert json.loads(shown(capsys, folder, json=True)) == json.loads(json.dumps(inspect(folder)))


def test_a_model_in_high_precision(save, capsys):
    text = shown(capsys, save(llama()))
    assert "high precision" in text and "0.0% in FP8" in text


def test_an_error_is_one_line(tmp_path, capsys):
    assert main(Namespace(checkpoint=str(tmp_path / "nothing"), json=False)) == 1
    assert capsys.readouterr().err.startswith("error: ") and "is not a folder" not in capsys.readouterr().out
