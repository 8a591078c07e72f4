"""Loading foreign FP8 checkpoints: experts, ties, shards, classes, targets, and round trips with `export`."""

import json

import pytest
import torch
from checkpoint.foreign.test_compressed_tensors import said
from checkpoint.foreign.test_fine_grained import BLOCKS, named
from exporting.conftest import (  # noqa: F401
    CALIBRATED_CACHE,
    HEADS,
    SIZES,
    quantized,
    wide_llama,
    wide_mixtral,
)
from foreign_checkpoints import (
    STATIC,
    as_stored,
    change_tensors,
    check_no_copy,
    check_runs,
    coded,
    ids,
    llama,
    load,
    logits,
    mixtral,
    refusal,
    spread,
    write,
)
from grids import slow_but
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from optimum_fp8 import FP8CheckpointError, FP8Config, export, native_config
from optimum_fp8.formats import codes_beyond, number_format


def deepseek():
    """A DeepSeek-V3: latents, experts beside shared ones, the first layer without."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 128, "q_lora_rank": 128}
    sizes = {**SIZES, "intermediate_size": 256, "moe_intermediate_size": 128}
    parts = {"qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "first_k_dense_replace": 1}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **parts, **experts)).bfloat16()


ROUND_TRIPS = {
    "FP8_DYNAMIC": (wide_llama, "FP8_DYNAMIC", {}, "compressed-tensors"),
    "W8A16": (wide_llama, "W8A16", {}, "compressed-tensors"),
    "FP8_BLOCK": (wide_llama, "FP8_BLOCK", {}, "compressed-tensors"),
    "MXFP8": (wide_llama, "MXFP8", {}, "compressed-tensors"),
    "groups": (
        *(wide_llama, "FP8_DYNAMIC"),
        {"overrides": {"down_proj": {"scale_method": "block_128"}}},
        "compressed-tensors",
    ),
    "cache": (wide_llama, "FP8_DYNAMIC", {"kv_cache": True, "overrides": CALIBRATED_CACHE}, "compressed-tensors"),
    "experts": (wide_mixtral, "FP8_DYNAMIC", {}, "compressed-tensors"),
    "fp8": (wide_llama, "FP8_BLOCK", {}, "fp8"),
    "fp8 MXFP8": (wide_llama, "MXFP8", {}, "fp8"),
    "fp8 experts": (wide_mixtral, "FP8_BLOCK", {}, "fp8"),
    "DeepSeek": (deepseek, "FP8_BLOCK", {}, "fp8"),
}


@pytest.mark.parametrize("case", slow_but(ROUND_TRIPS, "cache", "experts"))
def test_what_was_exported_computes_the_same(quantized, tmp_path, case):  # noqa: F811
    make, preset, options, format = ROUND_TRIPS[case]
    ours, folder = quantized(make(), preset, **options)
    export(folder, tmp_path / "exported", format)
    hp_dtype = ours.config.quantization_config.hp_dtype
    found = load(tmp_path / "exported", hp_dtype=hp_dtype)
    assert torch.equal(logits(found), logits(ours))
    ours.generation_config.eos_token_id = found.generation_config.eos_token_id = None
    tokens = [each.generate(ids(), max_new_tokens=4, do_sample=False) for each in (ours, found)]
    assert torch.equal(*tokens)


def test_models_whose_modules_have_other_names_in_files(tmp_path):
    """transformers has rearranged LLaVA: files, and what the configuration says of them, keep the names of old."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    config = LlavaConfig(text_config=LlamaConfig(**SIZES, **HEADS), vision_config=vision, image_token_index=95)
    LlavaForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "plain")
    other = {"down_proj": {"activation_scheme": "weight_only"}}
    asked = FP8Config.preset("FP8_DYNAMIC", overrides=other, modules_to_not_convert=["patch_embedding"])
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", quantization_config=asked).eval()
    ours.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "theirs")
    assert any(key.startswith("language_model.model.") for key in load_file(tmp_path / "theirs" / "model.safetensors"))
    config = native_config(tmp_path / "theirs", hp_dtype="bf16")
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs", config=config).eval()
    assert torch.equal(logits(found), logits(ours))
    layers = {name: each.activations for name, each in found.named_modules() if hasattr(each, "codes")}
    assert {layers[name] for name in layers if name.endswith("down_proj")} == {"weight_only"}


# --- experts ------------------------------------------------------------------------------------------------------


def of_experts(model, weights):
    """A Mixtral whose layers and experts are dequantized by hand."""
    for name, parameter in model.named_parameters():
        if ".layers." not in name or parameter.ndim < 2 or name.endswith("mlp.gate.weight"):
            continue
        stack = parameter.data if parameter.ndim == 3 else parameter.data[None]
        halves = 2 if name.endswith("gate_up_proj") else 1
        for matrix in stack:
            for part in matrix.chunk(halves):
                made = coded(part, weights)
                part.copy_(made["weight"].float() * spread(made["scale"], made["weight"], weights))
    return model


@pytest.mark.parametrize("weights", slow_but(["tensor", "channel", "block"], "channel"))
def test_experts_one_by_one(tmp_path, weights):
    folder = write(tmp_path / "theirs", mixtral(), weights, "none", said(weights, "none", ignore=["re:.*gate$"]))
    found, expected = load(folder), logits(of_experts(mixtral(), weights))
    experts = found.model.layers[0].mlp.experts
    assert type(experts).__name__ == "FP8FusedExperts" and experts.gate_up_proj.dtype == torch.float8_e4m3fn
    assert (logits(found) - expected).norm() < 1e-4 * expected.norm()
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()), logits(found))


@pytest.mark.parametrize("equal", [True, False])
def test_static_inputs_of_experts(tmp_path, equal, caplog):
    folder = write(tmp_path / "theirs", mixtral(), "tensor", "static", said("tensor", "static", ignore=["re:.*gate$"]))

    def change(tensors):
        for number in range(4):
            tensors[f"model.layers.0.block_sparse_moe.experts.{number}.w2.input_scale"] *= number + 1
            if not equal:
                tensors[f"model.layers.0.block_sparse_moe.experts.{number}.w3.input_scale"] *= number + 1

    change_tensors(folder, change)
    for cls in (AutoModelForCausalLM, AutoModel):
        model = cls.from_pretrained(folder, config=native_config(folder))
        experts = next(each for name, each in model.named_modules() if name.endswith("experts"))
        assert torch.allclose(experts.intermediate_scale.flatten(), STATIC * torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert torch.allclose(experts.input_scale, torch.tensor([STATIC if equal else 4 * STATIC]))
    assert ("of which the largest is taken" in caplog.text) is not equal


def test_experts_scaled_in_two_ways_are_refused(tmp_path):
    folder = write(tmp_path / "theirs", mixtral(), "channel", "none", said("channel", "none", ignore=["re:.*gate$"]))
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    other = {**said("channel", "token")["config_groups"]["group_0"], "targets": ["re:.*experts.1.*"]}
    groups["group_1"] = other
    (folder / "config.json").write_text(json.dumps(config))
    assert "experts of one layer are read where all are scaled alike" in refusal(folder)


def test_experts_of_which_one_is_in_high_precision_are_refused(tmp_path):
    folder = write(tmp_path / "theirs", mixtral(), "channel", "none", said("channel", "none", ignore=["re:.*gate$"]))
    name = "model.layers.0.block_sparse_moe.experts.1.w1"

    def change(tensors):
        tensors.pop(f"{name}.weight_scale")
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()

    change_tensors(folder, change)
    assert f"{name.replace('block_sparse_moe', 'mlp')}" in refusal(folder)


# --- models and files ---------------------------------------------------------------------------------------------


def test_tied_embeddings(tmp_path):
    folder = write(tmp_path / "theirs", llama(tie_word_embeddings=True), "channel", "token", said(ignore=["lm_head"]))
    found = check_runs(folder, llama(tie_word_embeddings=True), "channel", "token")
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_head_in_fp8(tmp_path):
    def change(tensors):
        made = coded(tensors.pop("lm_head.weight"), "channel")
        tensors.update(as_stored("lm_head", made))

    folder = write(tmp_path / "theirs", llama(), "channel", "token", said(ignore=[]))
    change_tensors(folder, change)
    found = load(folder)
    assert found.lm_head.codes.dtype == torch.float8_e4m3fn


def test_shards(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "block", "group_128", BLOCKS, named("weight_scale_inv"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    keys = sorted(tensors)
    parts = [keys[::2], keys[1::2]]  # scales lie elsewhere than their codes
    for name, part in zip(shards, parts, strict=True):
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(shards, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check_runs(folder, llama(), "block", "group_128")


def test_the_base_model_of_a_checkpoint(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said())
    whole, base = load(folder), AutoModel.from_pretrained(folder, config=native_config(folder)).eval()
    check_no_copy(base)
    with torch.no_grad():
        assert torch.equal(base(ids()).last_hidden_state, whole.model(ids()).last_hidden_state)


def test_a_head_that_is_new(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said())
    found = LlamaForSequenceClassification.from_pretrained(folder, config=native_config(folder))
    check_no_copy(found)
    assert found.score.weight.dtype == torch.float32


def test_layers_that_a_model_leaves_out(tmp_path, monkeypatch):
    """Models leave out layers of their files that predict more tokens; others are missed."""
    more = {}
    for kind, name in (("weight", "weight"), ("scale", "weight_scale")):
        more[f"model.layers.1.mlp.up_proj.{name}"] = coded(torch.randn(384, 256), "channel")[kind]
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said(), more=more)
    assert "model.layers.1.mlp.up_proj is in FP8 in the checkpoint, but cannot be" in refusal(folder)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1\..*"])
    check_runs(folder, llama(), "channel", "token")


def test_another_folder_than_that_of_the_configuration(tmp_path):
    one = write(tmp_path / "one", llama(), "channel", "token", said())
    other = write(tmp_path / "other", llama(), "channel", "token", said())
    with pytest.raises(FP8CheckpointError, match="other files are loaded"):
        AutoModelForCausalLM.from_pretrained(one, config=native_config(other))


def test_in_bfloat16(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "channel", "token", said())
    model = LlamaForCausalLM.from_pretrained(folder, config=native_config(folder), dtype=torch.bfloat16).eval()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == torch.float32 and model.lm_head.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


# --- targets ------------------------------------------------------------------------------------------------------


def halved(name, tensors):
    """Codes that stay below 240, with larger scales."""
    codes = (tensors["weight"].float() / 2).to(torch.float8_e4m3fn)
    return as_stored(name, {**tensors, "weight": codes, "scale": tensors["scale"] * 2})


def test_codes_beyond_a_target_are_adapted(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "tensor", "static", said("tensor", "static"))
    here, there = load(folder), load(folder, target="gaudi2")
    fmt = number_format("E4M3", "gaudi2")
    one, other = (each.model.layers[0].mlp.up_proj for each in (here, there))
    assert codes_beyond(one.codes, fmt) and not codes_beyond(other.codes, fmt)
    assert torch.equal(other.weight_scale, one.weight_scale * 2) and torch.equal(other.input_scale, one.input_scale * 2)
    assert (logits(there) - logits(here)).norm() < 0.1 * logits(here).norm()
    assert there.config.quantization_config.target == "gaudi2"
    there.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()), logits(there))


def test_codes_within_a_target_stay(tmp_path):
    folder = write(tmp_path / "theirs", llama(), "tensor", "token", said("tensor", "token"), halved)
    one, other = (load(folder, target=target).model.layers[0].mlp.up_proj for target in ("cpu", "gaudi2"))
    assert torch.equal(one.codes.float(), other.codes.float()) and torch.equal(one.weight_scale, other.weight_scale)
