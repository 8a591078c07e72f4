"""merge_lora: with the original to the bit what quantizing peft's own merge gives, and errors that are measured."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from adapters.conftest import PROJECTIONS, llama, merged_by_peft
from grids import slow_but
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8CheckpointError, FP8Config, FP8ConfigError, FP8NotAvailableError, merge_lora, rescale, verify

Q = "model.layers.0.self_attn.q_proj"


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    differing = [
        key for key, each in expected.items() if not torch.equal(found[key].view(torch.uint8), each.view(torch.uint8))
    ]
    assert differing == []


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 32}},
    "dora": {"use_dora": True},
    "attention alone": {"target_modules": ["q_proj", "v_proj"]},
    "half": {"dtype": torch.bfloat16},
}
PRESETS = ["FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "W8A16"]


WAYS = [(case, preset) for case in CASES for preset in PRESETS if case == "plain" or preset in ("FP8_DYNAMIC", "W8A16")]
FAST = [(case, "FP8_DYNAMIC") for case in CASES] + [("plain", "FP8_BLOCK")]


@pytest.mark.parametrize("case, preset", slow_but(WAYS, *FAST))
def test_with_the_original_it_is_what_peft_and_from_pretrained_make(case, preset, save, adapt, quantized, tmp_path):
    original = save(llama())
    adapter, fp8 = adapt(original, **CASES[case]), quantized(original, preset=preset)
    report = merge_lora(fp8, adapter, tmp_path / "merged", trained_on="base", original=original)
    expected = quantized(merged_by_peft(original, adapter, tmp_path / "peft"), "expected", preset)
    assert_equal(tensors(tmp_path / "merged"), tensors(expected))
    assert len(report.layers) == (4 if case == "attention alone" else 14) and report.loss is None
    assert all(0 < each.error < 0.05 for each in report.layers)


@pytest.mark.parametrize("trained_on", ["base", "fp8"])
def test_without_the_original_the_fp8_weights_are_merged(trained_on, save, adapt, quantized, tmp_path, caplog):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original)
    with caplog.at_level(logging.WARNING, "optimum_fp8"):
        report = merge_lora(fp8, adapter, tmp_path / "merged", trained_on=trained_on)
    dequantized = merged_by_peft(fp8, adapter, tmp_path / "peft", quantization_config=FP8Config(dequantize=True))
    assert_equal(tensors(tmp_path / "merged"), tensors(quantized(dequantized, "expected")))
    assert report.loss and report.loss in caplog.text
    assert ("rounded twice" in report.loss) == (trained_on == "base")
    assert all((each.error is None) == (trained_on == "base") for each in report.layers)


def test_errors_are_those_of_the_weights_that_were_trained(save, adapt, quantized, tmp_path):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original)
    exact = tensors(merged_by_peft(original, adapter, tmp_path / "exact", dtype=torch.float32))[f"{Q}.weight"]
    way = {}
    for name, options in {"with": {"original": original}, "without": {}}.items():
        way[name] = merge_lora(fp8, adapter, tmp_path / name, trained_on="base", **options)
        codes = tensors(tmp_path / name)
        found = codes[f"{Q}.weight"].squeeze(0).float() * codes[f"{Q}.weight_scale"]
        way[name, "error"] = float((found - exact).norm() / exact.norm())
    layer = next(each for each in way["with"].layers if each.name == Q)
    assert layer.error == pytest.approx(way["with", "error"], rel=1e-3)
    assert layer.otherwise == pytest.approx(way["without", "error"], rel=1e-3)
    assert layer.otherwise > 1.2 * layer.error


def test_an_adapter_of_the_fp8_model_fits_the_original_less(save, adapt, quantized, tmp_path):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original)
    report = merge_lora(fp8, adapter, tmp_path / "merged", trained_on="fp8", original=original)
    assert "whose error it may make up for" in report.loss
    assert all(each.error > each.otherwise for each in report.layers)


def test_transposed_layers(save, adapt, quantized, tmp_path):
    original = save(tiny_gpt2().bfloat16())
    adapter = adapt(original, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    fp8 = quantized(original)
    merge_lora(fp8, adapter, tmp_path / "merged", trained_on="base", original=original)
    expected = quantized(merged_by_peft(original, adapter, tmp_path / "peft"), "expected")
    assert_equal(tensors(tmp_path / "merged"), tensors(expected))


def test_layers_in_high_precision_are_merged_in_their_dtype(save, adapt, quantized, tmp_path):
    original, left = save(llama()), ["down_proj", "layers.1.self_attn"]
    adapter, fp8 = adapt(original), quantized(original, modules_to_not_convert=left)
    report = merge_lora(fp8, adapter, tmp_path / "merged", trained_on="base", original=original)
    peft_merged = merged_by_peft(original, adapter, tmp_path / "peft")
    assert_equal(tensors(tmp_path / "merged"), tensors(quantized(peft_merged, "expected", modules_to_not_convert=left)))
    assert {each.name for each in report.layers if not each.in_fp8} == {
        *(f"model.layers.{n}.mlp.down_proj" for n in range(2)),
        *(f"model.layers.1.self_attn.{name}" for name in PROJECTIONS[:4]),
    }


def test_scales_of_activations_stay_and_are_counted(save, adapt, quantized, tmp_path):
    original = save(llama())
    data = [{"input_ids": torch.arange(32).reshape(2, 16)}]
    adapter, fp8 = adapt(original), quantized(original, preset="FP8", dataset=data)
    report = merge_lora(fp8, adapter, tmp_path / "merged", trained_on="base", original=original)
    before, after = tensors(fp8), tensors(tmp_path / "merged")
    kept = [key for key in before if key.endswith(".input_scale")]
    assert len(kept) == report.static_scales == 14 and "14 scales of activations were kept" in str(report)
    assert all(torch.equal(before[key], after[key]) for key in kept)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.isfinite(loaded(**data[0]).logits).all()


def test_the_record_says_what_was_merged_and_the_rest_is_as_it_was(save, adapt, quantized, tmp_path):
    original = save(llama())
    data = [{"input_ids": torch.arange(32).reshape(2, 16)}]
    adapter, fp8 = adapt(original), quantized(original, preset="FP8", dataset=data)
    (fp8 / "notes.txt").write_text("beside", encoding="utf-8")
    for source, output in ((fp8, "once"), (tmp_path / "once", "twice")):
        merge_lora(source, adapter, tmp_path / output, trained_on="fp8")
    told = []
    for folder in (fp8, tmp_path / "twice"):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            told.append(json.loads(file.metadata()["optimum_fp8"]))
    changes = told[1]["provenance"].pop("changes")
    assert [(each["what"], each["trained_on"], each["added_to"]) for each in changes] == [
        ("LoRA adapter merged", "fp8", "fp8")
    ] * 2
    saves = [[each.pop(key, None) for key in ("save", "crc32", "files", "record")] for each in told]
    assert told[0] == told[1] and all(before != after for before, after in zip(*saves, strict=True))
    assert verify(tmp_path / "twice") == []
    assert (tmp_path / "twice" / "notes.txt").read_text(encoding="utf-8") == "beside"
    assert (tmp_path / "twice" / "config.json").read_bytes() == (fp8 / "config.json").read_bytes()


def test_several_files_keep_their_index(save, adapt, tmp_path):
    original = save(llama())
    adapter = adapt(original)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=FP8Config.preset("FP8_DYNAMIC"))
    model.save_pretrained(tmp_path / "fp8", max_shard_size="30KB")
    model.save_pretrained(tmp_path / "one")
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 2
    for name in ("fp8", "one"):
        merge_lora(tmp_path / name, adapter, tmp_path / f"{name} merged", trained_on="base", original=original)
    assert_equal(tensors(tmp_path / "fp8 merged"), tensors(tmp_path / "one merged"))
    index = "model.safetensors.index.json"
    before, after = (json.loads((tmp_path / name / index).read_text()) for name in ("fp8", "fp8 merged"))
    assert before == after
    AutoModelForCausalLM.from_pretrained(tmp_path / "fp8 merged")


def test_a_tied_head_in_fp8_has_the_weight_of_the_embedding_in_the_original(save, adapt, quantized, tmp_path):
    original = save(llama(tie_word_embeddings=True))
    adapter = adapt(original, target_modules=["lm_head", "q_proj"])
    fp8 = quantized(original, quantize_lm_head=True)
    merge_lora(fp8, adapter, tmp_path / "merged", trained_on="base", original=original)
    before, after = tensors(fp8), tensors(tmp_path / "merged")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["lm_head.weight"].view(torch.uint8), after["lm_head.weight"].view(torch.uint8))
    with pytest.raises(FP8NotAvailableError, match="the weight of lm_head is tied to another"):
        merge_lora(quantized(original, "kept"), adapter, tmp_path / "kept merged", trained_on="base")
    assert not (tmp_path / "kept merged").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_the_adapter_was_trained_on_must_be_said(tmp_path):
    with pytest.raises(FP8ConfigError, match="trained_on='lora': expected 'base' .* or 'fp8'"):
        merge_lora(tmp_path, tmp_path, tmp_path / "out", trained_on="lora")
    with pytest.raises(TypeError, match="trained_on"):
        merge_lora(tmp_path, tmp_path, tmp_path / "out")


def test_folders_that_do_not_fit_each_other(save, adapt, quantized, tmp_path):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original)
    torch.manual_seed(5)
    other = llama()
    for parameter in other.parameters():
        parameter.data += 0.1 * parameter.data.std() * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(FP8CheckpointError, match=r"_proj were made of: they differ by \d+\.\d % of its norm"):
        merge_lora(fp8, adapter, tmp_path / "out", trained_on="base", original=tmp_path / "other")
    with pytest.raises(FP8CheckpointError, match="holds no FP8 checkpoint of optimum_fp8"):
        merge_lora(original, adapter, tmp_path / "out", trained_on="base")
    with pytest.raises(FP8CheckpointError, match="exists: choose another folder"):
        merge_lora(fp8, adapter, fp8, trained_on="base")
    gpt2 = tmp_path / "gpt2"
    tiny_gpt2().bfloat16().save_pretrained(gpt2)
    with pytest.raises(FP8CheckpointError, match="which GPT2LMHeadModel does not have"):
        merge_lora(quantized(gpt2, "gpt2 fp8"), adapter, tmp_path / "out", trained_on="base")
    with pytest.raises(FP8CheckpointError, match="holds nothing for model.layers.0"):
        merge_lora(fp8, adapter, tmp_path / "out", trained_on="base", original=gpt2)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".fp8-*"))


def test_an_adapter_of_other_shapes(save, adapt, quantized, tmp_path):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original)
    path = adapter / "adapter_model.safetensors"
    held = load_file(path)
    key = f"base_model.model.{Q}.lora_B.weight"
    shutil.copytree(adapter, tmp_path / "wide")
    save_file({**held, key: torch.zeros(80, 4)}, tmp_path / "wide" / path.name)
    with pytest.raises(FP8CheckpointError, match=r"is \(80, 64\), but the weight of .*q_proj is \(64, 64\)"):
        merge_lora(fp8, tmp_path / "wide", tmp_path / "out", trained_on="base")


def test_a_damaged_checkpoint_is_refused(save, adapt, quantized, tmp_path):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original, preset="FP8_DYNAMIC")
    path = fp8 / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FP8CheckpointError, match="is not what was saved"):
        merge_lora(fp8, adapter, tmp_path / "merged", trained_on="base", original=original)
    assert not (tmp_path / "merged").exists()


def test_merged_weights_are_not_those_of_the_original(save, adapt, quantized, tmp_path):
    original = save(llama())
    fp8 = quantized(original, preset="FP8_DYNAMIC")
    merge_lora(fp8, adapt(original), tmp_path / "merged", trained_on="base", original=original)
    with pytest.raises(FP8CheckpointError, match="an adapter was merged into the checkpoint"):
        rescale(tmp_path / "merged", tmp_path / "gaudi2", target="gaudi2", original=original)


@pytest.mark.parametrize("said", [{"lora_alpha": None}, {"lora_alpha": "x"}, {"r": 0}])
def test_numbers_of_an_adapter_are_numbers(save, adapt, quantized, tmp_path, said):
    original = save(llama())
    adapter, fp8 = adapt(original), quantized(original, preset="FP8_DYNAMIC")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | said), encoding="utf-8")
    with pytest.raises(FP8CheckpointError, match=f"{next(iter(said))}=.*expected a number"):
        merge_lora(fp8, adapter, tmp_path / "merged", trained_on="base")
