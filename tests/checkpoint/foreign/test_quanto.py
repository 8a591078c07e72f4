"""optimum-quanto: weights alone, in either format of FP8."""

import json

import pytest
import torch
from foreign_checkpoints import check_runs, is_layer, llama, load, refusal, write


def names(name, tensors):
    ones = {f"{name}.{part}_scale": torch.ones(()) for part in ("input", "output")}
    return {f"{name}.weight._data": tensors["weight"], f"{name}.weight._scale": tensors["scale"], **ones}


def with_map(folder, weights="qfloat8_e4m3fn", activations="none"):
    layers = [name for name, _ in llama().named_modules() if is_layer(name) and name.endswith("_proj")]
    told = {name: {"weights": weights, "activations": activations} for name in layers}
    (folder / "quanto_qmap.json").write_text(json.dumps(told))
    return folder


def test_runs(tmp_path):
    folder = with_map(write(tmp_path / "theirs", llama(), "channel", "none", None, names))
    check_runs(folder, llama(), "channel", "none")


def test_e5m2(tmp_path):
    def in_e5m2(name, tensors):
        return names(name, {**tensors, "weight": tensors["weight"].to(torch.float8_e5m2)})

    folder = with_map(write(tmp_path / "theirs", llama(), "channel", "none", None, in_e5m2), "qfloat8_e5m2")
    layer = load(folder).model.layers[0].mlp.up_proj
    assert layer.codes.dtype == torch.float8_e5m2


@pytest.mark.parametrize("told, expected", [(("qint4",), "'qint4'"), (("qfloat8", "qfloat8"), "activations")])
def test_what_is_not_read_is_named(tmp_path, told, expected):
    folder = with_map(write(tmp_path / "theirs", llama(), "channel", "none", None, names), *told)
    assert "quant_method='quanto'" in (message := refusal(folder)) and expected in message
