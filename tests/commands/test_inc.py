"""`optimum-cli fp8 import-inc` and `export-inc`: INC's files become ours, and ours become INC's."""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser
from pathlib import Path

import pytest
from optimum.commands.register.register_fp8 import FP8ExportIncCommand, FP8ImportIncCommand
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_fp8 import FP8Config, Measurements
from optimum_fp8.commands.inc import main_export, main_import
from optimum_fp8.measure import model_fingerprint, read_inc
from optimum_fp8.measure.inc import nodes_of, write_inc
from optimum_fp8.modules import fp8_modules

DATA = Path(__file__).parents[1] / "data" / "inc"
LLAMA = DATA / "measurements" / "tiny_llama_maxabs_pow2"


def _runner(command, main, capsys):
    def run(*arguments: object):
        parser = ArgumentParser()
        command.parse_args(parser)
        status = main(parser.parse_args([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def import_inc(capsys):
    return _runner(FP8ImportIncCommand, main_import, capsys)


@pytest.fixture
def export_inc(capsys):
    return _runner(FP8ExportIncCommand, main_export, capsys)


@pytest.fixture
def llama(tmp_path):
    """A model whose weights have the ranges that INC measured."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    model = LlamaForCausalLM(config).bfloat16()
    for (name, kind), observer in Measurements.load(LLAMA).tensors.items():
        weight = model.get_submodule(name).weight.data
        if kind == "weight":
            weight.clamp_(-0.01, 0.01)[0, 0] = observer.range()
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.json"))}


@pytest.mark.core
def test_there_and_back(tmp_path, import_inc, export_inc):
    status, out, err = import_inc(LLAMA, "--output", tmp_path / "ours")
    assert status == 0 and "16 tensors of 8 modules" in out and "without --model" in err
    out_prefix = tmp_path / "inc" / "measure"
    status, out, err = export_inc(
        tmp_path / "ours", "--output", out_prefix, "--scale-method", "maxabs_pow2", "--target", "cpu"
    )
    assert status == 0, err
    written, expected = (
        {name: json.loads(text) for name, text in texts(folder).items()} for folder in (tmp_path / "inc", LLAMA)
    )
    for listed in (written, expected):
        listed["measure_hooks_maxabs_mod_list.json"].sort()
    assert written == expected
    assert len(out.splitlines()) == 5 and all(Path(line).exists() for line in out.splitlines())


@pytest.mark.core
def test_with_a_model_they_are_its_own(tmp_path, llama, import_inc, caplog):
    status, _, err = import_inc(LLAMA, "--output", tmp_path / "ours", "--model", llama)
    assert status == 0, err
    measurements = Measurements.load(tmp_path / "ours")
    assert measurements.fingerprint == model_fingerprint(AutoModelForCausalLM.from_pretrained(llama))
    caplog.clear(), caplog.set_level(logging.WARNING)
    config = FP8Config(
        mode="QUANTIZE", dump_stats_path=str(tmp_path / "ours"), scale_method="maxabs_pow2", target="cpu"
    )
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
    assert "fingerprint" not in caplog.text, "nothing is left to be taken on trust"
    ((_, scales),) = read_inc(LLAMA).scales.items()
    for name, module in fp8_modules(model).items():
        found = module.input_scale.item(), module.weight_scale.item()
        assert found == (scales[name].inputs[0].item(), scales[name].params["weight"].item()), name


def test_another_model_is_refused(tmp_path, llama, import_inc):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.lm_head.weight.data[0, 0] = 3.0
    model.save_pretrained(llama)
    status, _, err = import_inc(LLAMA, "--output", tmp_path / "ours", "--model", llama)
    assert status == 1 and "that of lm_head has the range 0.0844727, the model's 3" in err
    assert not (tmp_path / "ours_measurements.safetensors").exists()


def test_vllm_and_ranks_and_channels(tmp_path, llama, import_inc, export_inc):
    import_inc(LLAMA, "--output", tmp_path / "ours", "--model", llama)
    out = tmp_path / "vllm" / "inc_output"
    method = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
    options = ["--vllm", "--ranks", 2, "--model", llama, "--scale-method", method, "--target", "cpu"]
    status, said, err = export_inc(tmp_path / "ours", "--output", out, *options)
    assert status == 0 and "vLLM needs ranges of the outputs of model.layers.0." in err
    assert len(said.splitlines()) == 2 * 5
    inc = read_inc(out)
    assert inc.ranks == 2 and list(inc.ranges) == inc.modules
    projections = {name.rpartition(".")[2] for name in inc.ranges} - {"lm_head"}
    assert projections == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert inc.ranges["model.layers.0.self_attn.qkv_proj"].params["weight"].item() == 0.07568359375
    channels = inc.scales[method.upper()]["model.layers.0.self_attn.qkv_proj"].params["weight"]
    assert (channels[0].shape, channels[1].shape) == ((192,), (64,))
    status, _, err = export_inc(tmp_path / "ours", "--output", tmp_path / "x" / "m", "--scale-method", method)
    assert status == 1 and "needs the weight: give the model" in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--output", "x/m"], "no measurements at nowhere: expected what was --output"),
        ([DATA / "measured", "--output", "bare"], "--output 'bare' must be a folder and the beginning"),
        ([DATA / "measured", "--output", "x/m", "--ranks", -1], "--ranks -1"),
        ([DATA / "measured", "--output", "x/m", "--scale-method", "maxabs_hv"], "did you mean 'maxabs_hw'"),
        ([DATA / "measured", "--output", "x/m", "--model", "/no/folder"], "'/no/folder' is not a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_line(tmp_path, monkeypatch, export_inc, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = export_inc(*arguments)
    assert status == 1 and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unless_told(tmp_path, import_inc, export_inc):
    write_inc(tmp_path / "m", nodes_of(Measurements.load(LLAMA).tensors).nodes)
    before = texts(tmp_path)
    status, _, err = export_inc(DATA / "measured", "--output", tmp_path / "m")
    assert status == 1 and "--overwrite" in err and texts(tmp_path) == before
    assert export_inc(DATA / "measured", "--output", tmp_path / "m", "--overwrite")[0] == 0
    assert list(read_inc(tmp_path / "m").ranges) == ["0", "2"]
    assert import_inc(DATA / "measured", "--output", tmp_path / "o")[0] == 0
    status, _, err = import_inc(LLAMA, "--output", tmp_path / "o")
    assert status == 1 and "--overwrite" in err


def test_scales_of_other_measurements_are_not_left_for_inc_to_use(tmp_path, export_inc):
    options = ["--output", tmp_path / "m", "--overwrite", "--target", "cpu"]
    assert export_inc(DATA / "measured", *options, "--scale-method", "maxabs_pow2")[0] == 0
    status, _, err = export_inc(LLAMA, *options)
    assert status == 1 and "MAXABS_POW2.json is of other measurements, and INC would go on using it" in err
    assert list(read_inc(tmp_path / "m").ranges) == ["0", "2"]


def test_ours_need_no_import(tmp_path, import_inc):
    Measurements.load(DATA / "measured").save(tmp_path / "ours")
    status, _, err = import_inc(tmp_path / "ours", "--output", tmp_path / "x")
    assert status == 1 and "has measurements of ours already" in err
