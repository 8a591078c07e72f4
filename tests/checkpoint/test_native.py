"""Our checkpoints: overrides when loading, dequantizing, damage, and what happens without the plugin."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import pytest
import torch
from hf.conftest import llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.errors import FP8CheckpointError, FP8NotAvailableError
from optimum_fp8.modules import fp8_modules


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.fixture
def quantized(save, batches):
    return AutoModelForCausalLM.from_pretrained(save(llama()), quantization_config=FP8Config(dataset=batches))


@pytest.fixture
def checkpoint(quantized, tmp_path) -> str:
    quantized.save_pretrained(tmp_path / "fp8")
    return str(tmp_path / "fp8")


def edit(folder: str, change) -> None:
    """Apply `change` to the tensors of a checkpoint."""
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_on_disk(checkpoint):
    tensors = load_file(Path(checkpoint) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert tensors[f"{name}.weight"].shape == (1, 96, 64) and tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{name}.weight_scale"].shape == (1,) and tensors[f"{name}.weight_scale"].dtype == torch.float32
    assert tensors[f"{name}.input_scale"].shape == (1,)
    config = json.loads((Path(checkpoint) / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["mode"], config["target"]) == ("optimum_fp8", "LOAD", "cpu")
    assert config["modules_to_not_convert"] == ["lm_head"] and config["dataset"] is None


@pytest.mark.core
@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "pipeline"])
def test_without_the_plugin_loading_fails_loudly(checkpoint, tokenizer, loader):
    tokenizer.save_pretrained(checkpoint)
    load = {
        "AutoModelForCausalLM": f"transformers.AutoModelForCausalLM.from_pretrained({checkpoint!r})",
        "pipeline": f"transformers.pipeline('text-generation', {checkpoint!r})",
    }[loader]
    script = f"import sys, transformers\n{load}\nassert 'optimum_fp8' not in sys.modules\nprint('LOADED')"
    run = fresh.TRANSFORMERS.try_to_run(script, folder=checkpoint)
    assert run.returncode != 0 and "LOADED" not in run.stdout
    assert "mismatch" in run.stderr.lower() and "[1, 96, 64]" in run.stderr


def test_with_the_plugin_the_same_process_loads(checkpoint):
    script = (
        "import optimum_fp8, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({checkpoint!r})\n"
        "print(optimum_fp8.quantization_report(model))"
    )
    assert "14 of 15 candidate modules in FP8" in fresh.TRANSFORMERS.run(script)


@pytest.mark.core
def test_dequantize_while_loading(checkpoint, quantized, ids, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=FP8Config(dequantize=True))
    assert not fp8_modules(plain) and not hasattr(plain.config, "quantization_config")
    up = quantized.model.layers[0].mlp.up_proj
    expected = (up.codes.float() * up.weight_scale).to(torch.bfloat16)
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, expected)
    plain.save_pretrained(tmp_path / "plain")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not fp8_modules(reloaded) and torch.equal(logits(reloaded, ids), logits(plain, ids))


def test_dequantize_through_the_model_config(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    config.quantization_config["dequantize"] = True
    assert not fp8_modules(AutoModelForCausalLM.from_pretrained(checkpoint, config=config))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_model_dequantize(checkpoint, ids, dtype):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = logits(model, ids)
    plain = model.dequantize(dtype) if dtype else model.dequantize()
    assert not fp8_modules(plain) and type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == (dtype or torch.bfloat16)
    if dtype is None:
        assert ((logits(plain, ids) - before).norm() / before.norm()).item() < 0.05
    assert not plain.is_quantized and not hasattr(plain, "hf_quantizer")


def test_target_takes_effect(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=FP8Config(target="gaudi3"))
    assert {module.scheme.arithmetic for module in fp8_modules(model).values()} == {"gaudi"}
    assert model.config.quantization_config.target == "gaudi3"


@pytest.mark.parametrize("method", ["maxabs_hw", "maxabs_pcs_pow2"])
def test_a_target_of_a_smaller_full_scale_takes_effect(save, ids, batches, tmp_path, method):
    config = FP8Config(scale_method=method, weight_backoff=1.0)  # codes use all of the range
    config = config if config.scheme == "dynamic" else config.replace(dataset=batches)
    original = AutoModelForCausalLM.from_pretrained(save(llama()), quantization_config=config)
    original.save_pretrained(tmp_path / "fp8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=FP8Config(target="gaudi2"))
    for name, module in fp8_modules(model).items():
        before = original.get_submodule(name)
        codes = module.codes.view(torch.uint8) & 0x7F
        assert codes.max() <= 0x77 < (before.codes.view(torch.uint8) & 0x7F).max()
        values, expected = module.dequantized_weight(torch.float32), before.dequantized_weight(torch.float32)
        assert ((values - expected).abs() <= module.weight_scale * 2**-10).all(), "only subnormal codes may round"
    found, expected = logits(model, ids), logits(original, ids)
    assert ((found - expected).norm() / expected.norm()).item() < 0.05
    model.save_pretrained(tmp_path / "gaudi2")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "gaudi2")
    assert reloaded.config.quantization_config.target == "gaudi2" and torch.equal(logits(reloaded, ids), found)


def test_a_target_written_into_the_configuration_is_checked(save, tmp_path):
    config = FP8Config(weight_backoff=1.0, activation_scheme="dynamic")
    AutoModelForCausalLM.from_pretrained(save(llama()), quantization_config=config).save_pretrained(tmp_path / "fp8")
    edited = AutoConfig.from_pretrained(tmp_path / "fp8")
    edited.quantization_config["target"] = "gaudi2"
    with pytest.raises(FP8CheckpointError, match=r"made with target='cpu', .* says 'gaudi2'.*FP8Config\(target=…\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", config=edited)
    edited = AutoConfig.from_pretrained(tmp_path / "fp8")
    edited.quantization_config["target"] = "gaudi2"
    edit(tmp_path / "fp8", lambda tensors: None)  # as a tool does that copies tensors alone
    with pytest.raises(FP8CheckpointError, match=r"codes up to \d+.*gaudi2 reads those above 240 as Inf"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", config=edited)


@pytest.mark.parametrize(
    "override",
    [
        {"scale_method": "maxabs_pow2"},
        {"fp8_config": "E5M2"},
        {"activation_scheme": "dynamic"},
        {"dataset": ["text"]},
        {"mode": "MEASURE"},
        {"quantize_lm_head": True},
        {"use_qdq": True},
    ],
    ids=lambda override: next(iter(override)),
)
def test_overrides_that_cannot_take_effect_raise(checkpoint, override):
    with pytest.raises(FP8CheckpointError, match=next(iter(override))):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=FP8Config(**override))


def test_an_override_that_agrees_is_accepted(checkpoint, quantized, ids):
    config = FP8Config(scale_method="maxabs_hw", fp8_config="E4M3", target="auto", activation_scheme="static")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    assert torch.equal(logits(model, ids), logits(quantized, ids))


@pytest.mark.parametrize("tensor", ["weight", "weight_scale", "input_scale"])
def test_a_missing_tensor_is_named(checkpoint, tensor):
    name = f"model.layers.1.mlp.up_proj.{tensor}"
    edit(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(FP8CheckpointError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_damaged_file_is_named(checkpoint):
    path = Path(checkpoint, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FP8CheckpointError, match=r"model\.safetensors cannot be read .* it is damaged, copy it again"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("tensor", ["weight_scale", "input_scale"])
def test_a_scale_that_is_none_is_named_when_loading_and_saving(checkpoint, quantized, tmp_path, tensor, value):
    name = f"model.layers.1.mlp.up_proj.{tensor}"
    edit(checkpoint, lambda tensors: tensors[name].fill_(value))
    with pytest.raises(FP8CheckpointError, match=f"{name}.*loaded".replace(".layers", r"\.layers")):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    getattr(quantized.model.layers[1].mlp.up_proj, tensor).data.fill_(value)
    with pytest.raises(FP8CheckpointError, match="saved"):
        quantized.save_pretrained(tmp_path / "again")


def test_base_model_and_other_heads(checkpoint, quantized, ids):
    base = AutoModel.from_pretrained(checkpoint)
    assert len(fp8_modules(base)) == 14
    expected = quantized.model(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    assert len(fp8_modules(classifier)) == 14 and type(classifier.score) is nn.Linear


def test_saved_base_model_loads_under_a_head(save, ids, batches, tmp_path):
    model = llama()
    base = AutoModel.from_pretrained(save(model), quantization_config=FP8Config(dataset=batches))
    base.save_pretrained(tmp_path / "base")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert len(fp8_modules(full)) == 14
    assert torch.equal(full.model(ids).last_hidden_state, base(ids).last_hidden_state)


@pytest.mark.core
def test_converted_by_hand_is_saved_like_any_other(save, ids, batches, tmp_path):
    model = prepare(AutoModelForCausalLM.from_pretrained(save(llama())), FP8Config())
    for batch in batches:
        logits(model, batch["input_ids"])
    convert(model)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "fp8")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(reloaded, ids), expected)
    assert len(quantization_report(reloaded).quantized) == 14


def test_casting_a_quantized_model_keeps_its_fp8_weights(quantized, ids):
    before = {name: module.codes.clone() for name, module in fp8_modules(quantized).items()}
    quantized.to(torch.float16)
    for name, module in fp8_modules(quantized).items():
        assert torch.equal(module.codes.view(torch.uint8), before[name].view(torch.uint8))
        assert module.weight_scale.dtype == module.input_scale.dtype == torch.float32
    assert logits(quantized, ids).dtype == torch.float16


def test_moving_to_disk_and_dequantizing_at_once_is_refused(checkpoint, tmp_path):
    device_map = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(FP8NotAvailableError, match="dequantize"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint,
            device_map=device_map,
            offload_folder=tmp_path / "offload",
            quantization_config=FP8Config(dequantize=True),
        )


def test_dequantize_after_saving(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "again")
    assert quantized.dequantize().model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weight: weight[0],
        lambda weight: weight[0].to(torch.bfloat16),
        lambda weight: weight.to(torch.float32).to(torch.float8_e5m2),
        lambda weight: weight.transpose(1, 2).contiguous(),
    ],
    ids=["two dimensions", "high precision", "other format", "transposed"],
)
def test_a_weight_that_is_not_as_we_write_it_is_refused(checkpoint, spoil):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: spoil(tensors[name])}))
    with pytest.raises(FP8CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: found .* expected "):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_what_is_saved_is_what_was_done(quantized, ids, tmp_path):
    quantized.config.quantization_config.target = "gaudi2"
    quantized.config.quantization_config.activation_scheme = "dynamic"
    quantized.save_pretrained(tmp_path / "again")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert reloaded.config.quantization_config.target == "cpu"
    assert torch.equal(logits(reloaded, ids), logits(quantized, ids))


def test_a_model_of_which_layers_were_converted_is_not_misread(save, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save(llama()))
    convert(model.model.layers[0], FP8Config(activation_scheme="dynamic"))
    model.save_pretrained(tmp_path / "part")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "part")


def test_the_head_of_a_wrapped_model_keeps_its_precision(save):
    wrapper = nn.ModuleList([AutoModelForCausalLM.from_pretrained(save(llama()))])
    convert(wrapper, FP8Config(activation_scheme="dynamic"))
    assert len(fp8_modules(wrapper)) == 14 and type(wrapper[0].lm_head) is nn.Linear


@pytest.mark.parametrize("options", [{}, {"blocklist": {"names": ["up_proj"]}}], ids=["head", "head and others"])
def test_after_reloading_the_report_says_why_the_head_is_in_high_precision(options, tmp_path):
    model = convert(llama(), FP8Config(activation_scheme="dynamic", **options))
    model.save_pretrained(tmp_path)
    reasons = {
        row.name: row.reason for row in quantization_report(AutoModelForCausalLM.from_pretrained(tmp_path)).modules
    }
    assert reasons.pop("lm_head") == "not FP8 in the checkpoint, kept by default: head, tied or float32"
    others = {reason for name, reason in reasons.items() if "up_proj" in name and options}
    assert others <= {"not FP8 in the checkpoint"}
