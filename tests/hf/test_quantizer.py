"""from_pretrained(…, quantization_config=FP8Config(…)): every activation scheme, dtype, layout and placement."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hf.conftest import llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

from optimum_fp8 import FP8Config, calibrate, convert, finalize_calibration, ops, quantization_report
from optimum_fp8.errors import (
    FP8CheckpointError,
    FP8ConfigError,
    FP8MeasurementError,
    FP8NotAvailableError,
    FP8ScaleError,
    FP8StateError,
)
from optimum_fp8.formats import is_fp8
from optimum_fp8.lifecycle.state import state_of
from optimum_fp8.modules import fp8_modules
from optimum_fp8.scales import SCALE_METHODS


def load(folder: str, config: FP8Config | None = None, **options):
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.core
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only", "auto"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantizes_saves_and_reloads_to_the_bit(save, ids, batches, tmp_path, scheme, tied):
    model = llama(tied)
    folder = save(model)
    config = FP8Config(activation_scheme=scheme, dataset=batches if scheme in ("static", "auto") else None)
    quantized = load(folder, config)
    expected = logits(quantized, ids)
    assert relative_error(expected, logits(model, ids)) < 0.08
    expected_scheme = "static" if scheme == "auto" else scheme
    assert {module.activations for module in fp8_modules(quantized).values()} == {expected_scheme}

    quantized.save_pretrained(tmp_path / "fp8")
    reloaded = load(str(tmp_path / "fp8"))
    assert torch.equal(logits(reloaded, ids), expected)
    assert quantization_report(reloaded).kernels == {ops.cpu.backends()[0]: 14}
    # and once more: a reloaded model is a model like any other
    reloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(str(tmp_path / "again")), ids), expected)


@pytest.mark.parametrize("method", SCALE_METHODS)
def test_every_scale_method_survives_a_round_trip(save, ids, batches, tmp_path, method):
    config = FP8Config(scale_method=method)
    if config.scheme == "auto":
        config = config.replace(dataset=batches)
    quantized = load(save(llama()), config)
    quantized.save_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(load(str(tmp_path / "fp8")), ids), logits(quantized, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_any_dtype(save, ids, batches, tmp_path, dtype, stored):
    folder = save(llama(), stored)
    quantized = load(folder, FP8Config(dataset=batches), dtype=dtype)
    expected = logits(quantized, ids)
    assert expected.dtype == dtype
    assert {module.weight_scale.dtype for module in fp8_modules(quantized).values()} == {torch.float32}
    assert {module.input_scale.dtype for module in fp8_modules(quantized).values()} == {torch.float32}
    quantized.save_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(load(str(tmp_path / "fp8")), ids), expected)


def test_the_reloaded_model_computes_with_the_fp8_bytes(save, ids, batches, tmp_path):
    quantized = load(save(llama()), FP8Config(dataset=batches))
    quantized.save_pretrained(tmp_path / "fp8")
    reloaded = load(str(tmp_path / "fp8"))
    before = logits(reloaded, ids)
    weight = reloaded.model.layers[0].mlp.down_proj.codes
    assert is_fp8(weight.dtype)
    weight.data.view(torch.uint8)[0, 0] ^= 0x80 | 0x40
    assert not torch.equal(logits(reloaded, ids), before)


def test_fp8_parameters_are_frozen_and_others_are_not(save, batches):
    quantized = load(save(llama()), FP8Config(dataset=batches))
    for module in fp8_modules(quantized).values():
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert quantized.model.norm.weight.requires_grad


def test_sharded_checkpoint(save, ids, batches, tmp_path):
    model = llama(num_hidden_layers=4)
    folder = save(model, max_shard_size="60KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    sharded = load(folder, FP8Config(dataset=batches))
    whole = load(save(model, name="whole"), FP8Config(dataset=batches))
    assert torch.equal(logits(sharded, ids), logits(whole, ids))
    sharded.save_pretrained(tmp_path / "fp8", max_shard_size="60KB")
    assert json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())["weight_map"]
    assert torch.equal(logits(load(str(tmp_path / "fp8")), ids), logits(whole, ids))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(save, ids, batches, device_map):
    folder = save(llama())
    plain = load(folder, FP8Config(dataset=batches))
    assert torch.equal(logits(load(folder, FP8Config(dataset=batches), device_map=device_map), ids), logits(plain, ids))


DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"} | dict.fromkeys(
    ("model.norm", "model.rotary_emb", "lm_head"), "cpu"
)


def test_disk_offload_while_quantizing_raises(save, batches, tmp_path):
    with pytest.raises(FP8NotAvailableError, match="disk.*quantize and save the model once"):
        load(save(llama()), FP8Config(dataset=batches), device_map=DISK, offload_folder=tmp_path / "offload")


def test_disk_offload_of_a_quantized_checkpoint_is_exact(save, ids, batches, tmp_path):
    quantized = load(save(llama()), FP8Config(dataset=batches))
    quantized.save_pretrained(tmp_path / "fp8")
    offloaded = load(str(tmp_path / "fp8"), device_map=DISK, offload_folder=tmp_path / "offload")
    assert offloaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits(offloaded, ids), logits(quantized, ids))
    with pytest.raises(FP8NotAvailableError, match="offloaded"):
        offloaded.save_pretrained(tmp_path / "again")


def test_quantized_head_of_a_tied_model_gets_its_own_weight(save, ids, batches, tmp_path):
    quantized = load(save(llama(tied=True)), FP8Config(dataset=batches, quantize_lm_head=True))
    assert is_fp8(quantized.lm_head.codes.dtype)
    assert quantized.model.embed_tokens.weight.dtype == torch.bfloat16
    quantized.save_pretrained(tmp_path / "fp8")
    reloaded = load(str(tmp_path / "fp8"))
    assert is_fp8(reloaded.lm_head.codes.dtype)
    assert torch.equal(logits(reloaded, ids), logits(quantized, ids))


def test_through_a_pipeline(save, tmp_path, tokenizer):
    folder = save(llama())
    tokenizer.save_pretrained(folder)
    generator = pipeline("text-generation", folder, model_kwargs={"quantization_config": FP8Config()})
    assert len(fp8_modules(generator.model)) == 14
    assert generator("ab", max_new_tokens=2, do_sample=False)[0]["generated_text"]


def test_auto_without_data_is_dynamic_and_says_so_once(save, caplog):
    with caplog.at_level(logging.INFO, "optimum_fp8"):
        quantized = load(save(llama()), FP8Config())
    assert {module.activations for module in fp8_modules(quantized).values()} == {"dynamic"}
    assert len([record for record in caplog.records if "dynamically" in record.message]) == 1


@pytest.mark.core
def test_static_without_data_is_measured_by_hand(save, ids, batches, tmp_path, caplog):
    folder, prefix = save(llama()), str(tmp_path / "stats" / "measure")
    model = load(folder, FP8Config(activation_scheme="static", dump_stats_path=prefix))
    assert "measuring state" in caplog.text and "convert(model)" in caplog.text
    with pytest.raises(FP8StateError, match="measuring state"):
        model.save_pretrained(tmp_path / "fp8")
    with pytest.raises(FP8MeasurementError, match="calibration data"):
        convert(model)
    for batch in batches:
        logits(model, batch["input_ids"])
    finalize_calibration(model)
    convert(model)
    in_one_call = load(folder, FP8Config(dataset=batches))
    assert torch.equal(logits(model, ids), logits(in_one_call, ids))
    # the measurements are of this very model: from now on they are found
    found = load(folder, FP8Config(dump_stats_path=prefix))
    assert torch.equal(logits(found, ids), logits(in_one_call, ids))


def test_measure_then_quantize_in_two_processes(save, ids, batches, tmp_path):
    folder, prefix = save(llama()), str(tmp_path / "stats" / "measure")
    measured = load(folder, FP8Config(mode="MEASURE", dump_stats_path=prefix, dataset=batches))
    assert not fp8_modules(measured) and torch.equal(logits(measured, ids), logits(load(folder), ids))
    quantized = load(folder, FP8Config(mode="QUANTIZE", dump_stats_path=prefix))
    assert {module.activations for module in fp8_modules(quantized).values()} == {"static"}
    # the measured model itself can be converted and saved
    convert(measured)
    measured.save_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(load(str(tmp_path / "fp8")), ids), logits(measured, ids))
    assert torch.equal(logits(measured, ids), logits(quantized, ids))


def test_measurements_of_another_model_are_not_applied(save, batches, tmp_path, caplog):
    prefix = str(tmp_path / "stats" / "measure")
    load(save(llama()), FP8Config(mode="MEASURE", dump_stats_path=prefix, dataset=batches))
    other = save(llama(), name="other")
    with pytest.raises(FP8MeasurementError, match="another model"):
        load(other, FP8Config(mode="QUANTIZE", dump_stats_path=prefix))
    quantized = load(other, FP8Config(dump_stats_path=prefix))
    assert "another model" in caplog.text
    assert {module.activations for module in fp8_modules(quantized).values()} == {"dynamic"}


def test_calibrating_a_model_in_measuring_state_with_a_dataset(save, batches):
    model = load(save(llama()), FP8Config(activation_scheme="static"))
    calibrate(model, FP8Config(dataset=batches))
    assert state_of(convert(model)).phase == "converted"


def test_modules_calibration_never_reached(save, batches, tmp_path, ids, caplog):
    def only_the_first_layer(model):
        model.model.layers[0](
            torch.randn(1, 4, 64, dtype=model.dtype),
            position_embeddings=model.model.rotary_emb(torch.zeros(1, 4, 1, dtype=model.dtype), torch.arange(4)[None]),
        )

    folder = save(llama())
    with pytest.raises(FP8MeasurementError, match=r"7 selected modules.*model\.layers\.1\.self_attn\.q_proj"):
        load(folder, FP8Config(dataset=only_the_first_layer))
    quantized = load(folder, FP8Config(dataset=only_the_first_layer, ignore_modules_wo_measures=True))
    assert len(fp8_modules(quantized)) == 7 and "not reached" in caplog.text
    quantized.save_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(load(str(tmp_path / "fp8")), ids), logits(quantized, ids))


@pytest.mark.parametrize("method", ["maxabs_pow2", "maxabs_pcs_pow2", "maxabs_pow2_opt_weight"])
def test_ranges_of_weights_are_measured_while_they_become_fp8(save, method):
    original = llama().bfloat16()
    model = load(save(original), FP8Config(activation_scheme="dynamic", scale_method=method))
    for name in fp8_modules(model):
        expected = original.get_submodule(name).weight.abs().amax().item()
        assert state_of(model).measurements.range(name, "weight") == expected


def test_a_weight_with_nan_is_named(save):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(FP8ScaleError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
        load(save(model), FP8Config())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "LOAD"}, "mode='LOAD'.*not one"), ({"dequantize": True}, "dequantize=True.*not one")],
)
def test_what_only_fp8_checkpoints_can_do(save, options, message):
    with pytest.raises(FP8ConfigError, match=message):
        load(save(llama()), FP8Config(**options))


def test_other_dtypes_are_refused(save):
    with pytest.raises(FP8ConfigError, match="float64"):
        load(save(llama()), FP8Config(), dtype=torch.float64)


@pytest.mark.parametrize("tensor", ["mlp.up_proj.weight", "self_attn.q_proj.bias"])
def test_a_tensor_missing_from_the_original_checkpoint_is_named(save, tensor):
    folder = save(llama(attention_bias=True))
    path, name = f"{folder}/model.safetensors", f"model.layers.1.{tensor}"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FP8CheckpointError, match=f"{name}.*modules_to_not_convert".replace(".layers", r"\.layers")):
        load(folder, FP8Config())
    name = name.rpartition(".")[0]
    assert load(folder, FP8Config(modules_to_not_convert=[name])).get_submodule(name)


def test_a_weight_of_another_shape_is_named(save):
    folder = save(llama())
    path, name = f"{folder}/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(
        FP8ScaleError, match=r"up_proj: the checkpoint's weight is \(95, 64\), the model expects \(96, 64\)"
    ):
        load(folder, FP8Config())
