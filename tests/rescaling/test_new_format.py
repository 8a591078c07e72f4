"""From one FP8 format to another, from the values that a checkpoint has in FP8."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
import transformers as hf
from exporting.conftest import wide_llama
from grids import slow_but
from moe_models import tiny_moe
from rescaling.conftest import ATTENTION, tensors
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8CheckpointError, FP8Config, FP8ConfigError, FP8MeasurementError, requantize
from optimum_fp8.checkpoint.provenance import provenance_of
from optimum_fp8.modules import fp8_modules
from optimum_fp8.ops import cast_from_fp8
from optimum_fp8.scales import quantize_weight

IDS = torch.arange(24).reshape(2, 12)
PRESETS = ("FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "W8A16")
CHANGES = list(permutations(PRESETS, 2))


def preset(name, **keys):
    return FP8Config.preset(name, **keys)


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits.float()


def layers(folder):
    return fp8_modules(AutoModelForCausalLM.from_pretrained(folder))


def distance(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.core
@pytest.mark.parametrize("before, after", slow_but(CHANGES, ("FP8_BLOCK", "FP8_DYNAMIC"), ("FP8_DYNAMIC", "MXFP8")))
def test_every_format_becomes_every_other_and_computes_nearly_the_same(fp8, tmp_path, before, after):
    source = fp8(preset(before, target="cpu"), wide_llama())
    made = requantize(source, tmp_path / "out", preset(after))
    assert len(made.rows) == 14 and sum(row.weights for row in made.rows) > 0
    found, direct = layers(tmp_path / "out"), layers(fp8(preset(after, target="cpu"), wide_llama(), name="direct"))
    old = layers(source)
    for row in made.rows:
        hp_dtype = old[row.module].scheme.hp_dtype if after != "MXFP8" else torch.float32  # presets but one leave it
        assert found[row.module].scheme == replace(direct[row.module].scheme, hp_dtype=hp_dtype)
        assert found[row.module].weight_scale.shape == direct[row.module].weight_scale.shape
        ours, theirs = (each[row.module].dequantized_weight(torch.float32) for each in (found, old))
        assert row.error == pytest.approx(distance(ours, theirs), abs=1e-6) and row.error < 0.04
        assert (row.rounded == 0) == (row.error == 0.0)
    assert distance(logits(tmp_path / "out"), logits(source)) < 0.12


def test_coarser_scales_follow_from_the_values_in_fp8(fp8, tmp_path):
    source = fp8(preset("FP8_BLOCK", target="cpu"), wide_llama())
    made = requantize(source, tmp_path / "out", preset("FP8_DYNAMIC"))
    assert len(made.rounded) == 14 and 0.01 < made.error < 0.04
    assert [row.error for row in made.rounded] == sorted((row.error for row in made.rows), reverse=True)
    for name, layer in layers(tmp_path / "out").items():
        before, scheme = layers(source)[name], layer.scheme
        values = cast_from_fp8(before.codes, before.weight_scale, torch.float32)
        codes, scale, _ = quantize_weight(values, scheme.weight, scheme.fmt, scheme.hp_dtype)
        assert torch.equal(layer.weight_scale, scale) and torch.equal(layer.codes.float(), codes.float())
        break
    found = provenance_of(tmp_path / "out")
    (change,) = found["changes"]
    assert change["what"] == "requantized" and change["scale_method"] == "full_range_pcs"
    assert change["before"]["scale_method"] == "block_128" and change["modules_rounded_again"] == 14
    assert change["largest_added_error"] == pytest.approx(made.error, abs=1e-6)


@pytest.mark.core
def test_static_scales_follow_from_the_record(fp8, batches, tmp_path):
    options = {"dataset": batches, "target": "cpu", **ATTENTION}
    source = fp8(FP8Config(scale_method="maxabs_pow2", **options))
    requantize(source, tmp_path / "out", preset("FP8"))
    found, ranges = tensors(tmp_path / "out"), provenance_of(source)["modules"]
    scales = {name: each for name, each in found.items() if name.endswith("input_scale")}
    assert len(scales) == 14
    for name, scale in scales.items():
        expected = torch.tensor(ranges[name.removesuffix(".input_scale")]["input"]).bfloat16() / 448
        assert torch.equal(scale, expected.float().reshape(1))
    assert provenance_of(tmp_path / "out")["modules"] == ranges


def test_static_scales_without_a_record_need_data(fp8, batches, tmp_path):
    source = fp8(preset("FP8_DYNAMIC", target="cpu"))
    with pytest.raises(FP8MeasurementError, match="holds no ranges of 14 modules .*: give a dataset to measure them"):
        requantize(source, tmp_path / "out", preset("FP8"))
    assert not (tmp_path / "out").exists()
    requantize(source, tmp_path / "out", preset("FP8", dataset=batches))
    told = provenance_of(tmp_path / "out")
    assert told["data"]["source"] == "list" and told["data"]["samples"] == 8 and all(told["modules"].values())
    assert "model_fingerprint" not in told["data"]  # that of a dequantized model is no original's
    assert {layer.activations for layer in layers(tmp_path / "out").values()} == {"static"}
    assert distance(logits(tmp_path / "out"), logits(source)) < 0.1


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts(fp8, tmp_path, family):
    torch.manual_seed(0)
    source = fp8(preset("FP8_DYNAMIC", target="cpu"), tiny_moe(family))
    made = requantize(source, tmp_path / "out", FP8Config(scale_method="full_range", fp8_config="E5M2"))
    (experts,) = (row for row in made.rows if row.module.endswith("experts"))
    assert experts.weights > 1000 and 0.02 < experts.error < 0.08
    e5m2 = FP8Config(scale_method="full_range", fp8_config="E5M2", activation_scheme="dynamic")
    direct = fp8(e5m2, tiny_moe(family), "direct")
    ours, theirs = tensors(tmp_path / "out"), tensors(direct)
    assert {name: (each.dtype, each.shape) for name, each in ours.items()} == {
        name: (each.dtype, each.shape) for name, each in theirs.items()
    }
    assert distance(logits(tmp_path / "out"), logits(source)) < 0.2


def test_embeddings_and_heads(fp8, tmp_path):
    config = FP8Config(activation_scheme="dynamic", quantize_embeddings=True, quantize_lm_head=True, target="gaudi3")
    source = fp8(config)
    made = requantize(source, tmp_path / "out", FP8Config(target="gaudi2", scale_method="maxabs_pow2"))
    assert {row.module for row in made.rows} >= {"model.embed_tokens", "lm_head"}
    assert distance(logits(tmp_path / "out"), logits(source)) < 0.05


def test_convolutions_have_no_blocks(save, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "embedding_size": 8, "num_labels": 3}
    plain = save(hf.ResNetForImageClassification(hf.ResNetConfig(**sizes)).eval())
    config = FP8Config(activation_scheme="dynamic", target="cpu")
    hf.ResNetForImageClassification.from_pretrained(plain, quantization_config=config).save_pretrained(tmp_path / "fp8")
    with pytest.raises(FP8CheckpointError, match=r"its weight of 4 dimensions cannot be scaled per block 128×128"):
        requantize(tmp_path / "fp8", tmp_path / "out", preset("FP8_BLOCK"))
    made = requantize(tmp_path / "fp8", tmp_path / "out", preset("FP8_DYNAMIC"))
    assert len(made.rows) > 10 and made.error < 0.04


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FP8Config(), "nothing to change"),
        ({"scale_method": "full_range"}, "expected an FP8Config"),
        (FP8Config(scale_method="full_range", attention=True), "attention is not about scales and formats"),
        (FP8Config(scale_method="full_range", blocklist={"names": ["x"], "types": []}), "blocklist is not about"),
        (FP8Config(dataset=[1]), "nothing to change"),
        (FP8Config(scale_method="full_range", percentile=99.0, observer="percentile"), "a dataset with it, or leave"),
        (FP8Config(scale_method="full_range", batch_size=2), "batch_size says how ranges are measured, and nothing"),
    ],
    ids=["nothing", "dict", "attention", "blocklist", "data alone", "percentile", "batches"],
)
def test_keys_that_cannot_be_changed(config, message, tmp_path):
    with pytest.raises(FP8ConfigError, match=message):
        requantize(tmp_path / "nothing", tmp_path / "out", config)


def test_a_percentile_of_ranges_that_dynamic_scales_do_not_have(fp8, batches, tmp_path):
    source = fp8(preset("FP8_BLOCK", target="cpu"), wide_llama())
    keys = {"percentile": 99.0, "observer": "percentile"}
    with pytest.raises(FP8ConfigError, match="observer says how ranges are measured|percentile says how ranges"):
        requantize(source, tmp_path / "out", preset("FP8_DYNAMIC", **keys))
    with pytest.raises(FP8ConfigError, match="dataset is given, but activations are 'dynamic'"):
        requantize(source, tmp_path / "out", FP8Config(fp8_config="E5M2", dataset=batches, **keys))
    assert not (tmp_path / "out").exists()


def test_what_a_checkpoint_has_already_is_no_change(fp8, batches, tmp_path):
    source = fp8(FP8Config.preset("FP8", target="cpu", dataset=batches))
    with pytest.raises(FP8ConfigError, match="requantize: nothing to change: the checkpoint has scale_method="):
        requantize(source, tmp_path / "out", preset("FP8"))
    assert not (tmp_path / "out").exists()
    requantize(source, tmp_path / "out", preset("FP8", dataset=batches[:1]))  # has other ranges
    assert provenance_of(tmp_path / "out")["data"]["samples"] < provenance_of(source)["data"]["samples"]


def test_measuring_leaves_nothing_in_the_working_folder(fp8, batches, tmp_path, monkeypatch):
    source = fp8(preset("FP8_DYNAMIC", target="cpu"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    requantize(source, tmp_path / "out", preset("FP8", dataset=batches))
    assert not list((tmp_path / "here").iterdir())


def test_folders_that_are_there_or_foreign(save, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FP8CheckpointError, match="exists"):
        requantize(tmp_path, tmp_path / "out", preset("FP8_BLOCK"))
    with pytest.raises(FP8CheckpointError, match="holds no FP8 checkpoint of optimum_fp8"):
        requantize(save(wide_llama()), tmp_path / "new", preset("FP8_BLOCK"))


def test_attention_of_torch_with_weights_of_its_own(save, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).eval()
    config = FP8Config(activation_scheme="dynamic", target="gaudi3")
    fp8 = hf.SiglipVisionModel.from_pretrained(save(model), quantization_config=config)
    fp8.save_pretrained(tmp_path / "fp8")
    made = requantize(tmp_path / "fp8", tmp_path / "out", preset("FP8_DYNAMIC", target="gaudi2"))
    (head,) = (row for row in made.rows if row.module.endswith("head.attention"))
    assert head.weights == 3 * 32 * 32
    pixels = torch.rand(1, 3, 16, 16).bfloat16()
    with torch.no_grad():
        found = hf.SiglipVisionModel.from_pretrained(tmp_path / "out")(pixels).pooler_output.float()
        assert distance(found, fp8(pixels).pooler_output.float()) < 0.1
