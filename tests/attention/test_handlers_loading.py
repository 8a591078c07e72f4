"""FP8 attention through from_pretrained: calibrated while loading, saved, reloaded, and refused where it must be."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_models import FAMILIES, all_attention_scales
from hf.conftest import VOCABULARY, llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from optimum_fp8 import FP8Config, calibrate, convert, dequantize, finalize_calibration, prepare, quantization_report
from optimum_fp8.attention import scales_of
from optimum_fp8.cache import in_fp8
from optimum_fp8.errors import (
    FP8CheckpointError,
    FP8ConfigError,
    FP8MeasurementError,
    FP8NotAvailableError,
)
from optimum_fp8.lifecycle.state import state_of

STATIC = {"attention": True, "kv_cache": True}
SCALES = {"q_scale", "k_scale", "v_scale", "p_scale", "output_scale"}


def load(folder, config, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, **options)


def seen(observer):
    """How many values an observer has seen."""
    return int(observer.statistics()["count"])


def scales(model):
    return {f"{name}.fp8_scales.{key}": scale.clone() for name, key, scale in all_attention_scales(model)}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.fixture
def quantized(save, batches):
    return load(save(llama()), FP8Config(dataset=batches, **STATIC))


@pytest.mark.core
@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("dataflow", ["fused", "unfused"])
def test_saved_and_reloaded_to_the_bit(save, batches, ids, tmp_path, scheme, granularity, dataflow):
    data = {"dataset": batches} if scheme == "static" else {}
    options = {"activation_scheme": scheme, "attention_granularity": granularity, "attention_dataflow": dataflow}
    model = load(save(llama()), FP8Config(**STATIC, **options, **data))
    before, generated = scales(model), model.generate(ids, max_new_tokens=6, do_sample=False)
    expected = SCALES - {"output_scale"} if dataflow == "unfused" else SCALES
    expected = {"p_scale"} if scheme == "dynamic" else expected
    assert {key.rpartition(".")[2] for key in before} == expected
    if granularity == "head" and scheme == "static":
        assert before["model.layers.0.self_attn.fp8_scales.q_scale"].shape == (4, 1, 1)
        assert before["model.layers.0.self_attn.fp8_scales.k_scale"].shape == (2, 1, 1)
    model.save_pretrained(tmp_path / "fp8")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert all(torch.equal(stored[key], scale) and stored[key].dtype == torch.float32 for key, scale in before.items())

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    after = scales(again)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(again.generate(ids, max_new_tokens=6, do_sample=False), generated)
    assert all(row.quantized and row.kernels and row.cached for row in quantization_report(again).attention)
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored.keys()


@pytest.mark.core
def test_one_scale_serves_the_cache_and_the_product_that_reads_it(quantized, ids):
    cache = quantized(ids, use_cache=True).past_key_values
    for number, layer in enumerate(quantized.model.layers):
        assert cache.layers[number].keys.scale is scales_of(layer.self_attn)["k_scale"]
        assert cache.layers[number].values.scale is scales_of(layer.self_attn)["v_scale"]
    assert not any("cache_scale" in key for key in scales(quantized))


def test_the_output_scale_is_the_input_scale_of_the_projection_behind_it(quantized):
    for layer in quantized.model.layers:
        assert torch.equal(scales_of(layer.self_attn)["output_scale"], layer.self_attn.o_proj.input_scale)


@pytest.mark.core
def test_latents_have_scales_of_their_own(save, tmp_path):
    family = FAMILIES["deepseek_v3, latents"]
    folder = save(family.make())
    config = FP8Config(dataset=[family.inputs] * 2, **STATIC)
    model = load(folder, config)
    found = {key.rpartition(".")[2] for key in scales(model)}
    assert found == SCALES | {"k_cache_scale", "v_cache_scale"}
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert torch.equal(again(**family.inputs).logits, model(**family.inputs).logits)
    assert {key.rpartition(".")[2] for key in scales(again)} == found


@pytest.mark.core
@pytest.mark.parametrize("family", ["bloom", "deberta_v2", "t5", "swin"])
def test_other_families_are_saved_and_reloaded_to_the_bit(save, tmp_path, family):
    family = FAMILIES[family]
    folder = save(family.make(), torch.float32)
    config = FP8Config(dataset=[family.inputs] * 2, attention=True, kv_cache=family.cached > 0)
    model = family.model_class.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "fp8")
    again = family.model_class.from_pretrained(tmp_path / "fp8")
    with torch.no_grad():
        assert torch.equal(again(**family.inputs)[0], model(**family.inputs)[0])
    assert scales(again).keys() == scales(model).keys() != set()


@pytest.mark.core
@pytest.mark.parametrize("damage", ["missing", "zero", "nan", "shape"])
def test_damaged_scales_are_refused(quantized, tmp_path, damage):
    quantized.save_pretrained(tmp_path / "fp8")
    path, key = tmp_path / "fp8" / "model.safetensors", "model.layers.1.self_attn.fp8_scales.v_scale"
    tensors = load_file(path)
    if damage == "missing":
        del tensors[key]
    elif damage == "shape":
        tensors[key] = tensors[key].repeat(5)
    else:
        tensors[key] = torch.full_like(tensors[key], 0.0 if damage == "zero" else torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FP8CheckpointError, match=key.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")


def test_a_broken_scale_is_not_saved(quantized, tmp_path):
    scales_of(quantized.model.layers[0].self_attn)["q_scale"].data.zero_()
    with pytest.raises(FP8CheckpointError, match=r"layers\.0\.self_attn\.fp8_scales\.q_scale is \[0\.0\]"):
        quantized.save_pretrained(tmp_path / "fp8")


@pytest.mark.core
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_chosen_implementation_wins_and_the_report_says_so(save, batches, ids, implementation):
    config = FP8Config(dataset=batches, attention=True)
    model = load(save(llama()), config, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation and not scales(model)
    report = quantization_report(model)
    assert [row.reason for row in report.attention] == [f"attn_implementation='{implementation}' was chosen"] * 2
    assert "0 of 2 attention modules in FP8" in str(report)


def test_a_model_whose_linears_only_are_quantized_is_left_alone(save, batches):
    model = load(save(llama()), FP8Config(dataset=batches))
    assert model.config._attn_implementation == "sdpa" and not scales(model)
    assert quantization_report(model).attention == [] and "attention" not in quantization_report(model).to_dict()


@pytest.mark.core
def test_dequantized_everything_is_as_before(quantized, ids):
    quantized.dequantize()
    assert not scales(quantized) and quantized.config._attn_implementation == "sdpa"
    assert type(quantized(ids, use_cache=True).past_key_values.layers[0]).__name__ == "DynamicLayer"
    quantized.to(torch.float32)  # nothing holds on to scales
    twin = llama()
    assert [name for name, _ in quantized.named_parameters()] == [name for name, _ in twin.named_parameters()]


def test_dequantized_while_loading(quantized, tmp_path, ids):
    quantized.save_pretrained(tmp_path / "fp8")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FP8Config(dequantize=True), dtype=torch.bfloat16
    )
    assert not scales(plain) and state_of(plain) is None
    assert torch.isfinite(plain(ids).logits).all()


@pytest.mark.core
def test_casts_and_moves_leave_scales_alone(save, batches, ids):
    config = FP8Config(dataset=batches, attention=True, scale_method="maxabs_arbitrary")
    model = load(save(llama()), config)
    before = scales(model)
    model.to(torch.float16)
    model.model.layers[0].to(torch.bfloat16)
    assert all(scale.dtype == torch.float32 and torch.equal(scale, before[key]) for key, scale in scales(model).items())
    assert all(scale.is_meta for _, _, scale in all_attention_scales(model.to("meta")))


def test_a_copy_is_a_model_of_its_own(quantized, ids):
    expected, twin = logits(quantized, ids), copy.deepcopy(quantized)
    dequantize(quantized)
    assert torch.equal(logits(twin, ids), expected)
    assert sum(quantization_report(twin).attention[0].kernels.values()) == 1


@pytest.mark.core
def test_blocked_attention_stays_in_high_precision(save, batches, tmp_path, ids):
    config = FP8Config(dataset=batches, blocklist={"names": [r"layers\.0\.self_attn$"]}, **STATIC)
    model = load(save(llama()), config)
    assert {key.split(".")[2] for key in scales(model)} == {"1"}
    cache = model(ids, use_cache=True).past_key_values
    assert [in_fp8(layer) for layer in cache.layers] == [False, True]
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert [row.reason for row in quantization_report(again).attention][0] == "not FP8 in the checkpoint"


@pytest.mark.parametrize("options", [{"attention": True}, {"attention": True, "attention_dataflow": "unfused"}, STATIC])
def test_probabilities_can_be_asked_for(save, batches, ids, options):
    model = load(save(llama()), FP8Config(dataset=batches, **options))
    with torch.no_grad():
        plain, asked = model(ids), model(ids, output_attentions=True)
    assert plain.attentions is None and torch.equal(plain.logits, asked.logits)
    assert len(asked.attentions) == 2 and asked.attentions[0].shape == (2, 4, 12, 12)
    assert torch.allclose(asked.attentions[0].float().sum(-1), torch.ones(2, 4, 12), atol=0.06)
    assert any("output_attentions" in reason for reason in quantization_report(model).fallbacks)


def test_training_mode_with_dropout_is_refused(save, batches, ids):
    model = load(save(llama(attention_dropout=0.5)), FP8Config(dataset=batches, attention=True))
    logits(model, ids)
    with pytest.raises(FP8NotAvailableError, match="dropout"):
        logits(model.train(), ids)


@pytest.mark.core
def test_for_gaudi2_scales_are_those_of_gaudi2_and_doubled_where_ranges_are_not_known(quantized, tmp_path, ids):
    before, path = scales(quantized), tmp_path / "fp8" / "model.safetensors"
    quantized.save_pretrained(tmp_path / "fp8")
    gaudi2 = FP8Config(target="gaudi2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=gaudi2)
    hardware = set(gaudi2.number_format.hardware_scales.descending())
    assert {scale for each in scales(again).values() for scale in each.flatten().tolist()} <= hardware
    assert torch.isfinite(logits(again, ids)).all()

    save_file(load_file(path), path, metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=gaudi2)
    for key, scale in scales(again).items():
        assert torch.equal(scale, 2 * before[key]) or (key.endswith("p_scale") and scale.tolist() == [2**-4])


def test_measured_once_any_granularity(save, batches, tmp_path):
    folder, prefix = save(llama()), str(tmp_path / "stats")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prepare(model, FP8Config(dump_stats_path=prefix, **STATIC))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    measured = finalize_calibration(model)
    for granularity, shape in (("tensor", (1,)), ("head", (2, 1, 1))):
        config = FP8Config(dump_stats_path=prefix, mode="QUANTIZE", attention_granularity=granularity, **STATIC)
        found = scales(load(folder, config))
        assert found["model.layers.1.self_attn.fp8_scales.k_scale"].shape == shape
    assert measured.range_per_head("model.layers.1.self_attn", "k").shape == (2,)


def test_measurements_without_attention_do_not_serve_it(save, batches, tmp_path):
    folder, prefix = save(llama()), str(tmp_path / "stats")
    load(folder, FP8Config(dataset=batches, mode="MEASURE", dump_stats_path=prefix))
    with pytest.raises(FP8MeasurementError, match="attention=True"):
        load(folder, FP8Config(mode="QUANTIZE", dump_stats_path=prefix, attention=True))


def test_a_cache_that_calibration_never_wrote_is_an_error(ids):
    model = prepare(llama(), FP8Config(kv_cache=True))
    model(ids, use_cache=False)
    with pytest.raises(FP8MeasurementError, match="use_cache=True"):
        convert(model)


def test_weight_only_layers_go_with_a_dynamic_cache_but_not_with_fp8_attention(save, ids):
    model = load(save(llama()), FP8Config(activation_scheme="weight_only", kv_cache=True))
    row = quantization_report(model).attention[0]
    assert row.activations == "cache only" and row.scales == {}
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.scale.shape == (2, 2, 12, 1)
    with pytest.raises(FP8ConfigError, match="weight_only"):
        FP8Config(activation_scheme="weight_only", attention=True)


@pytest.mark.core
@pytest.mark.parametrize("options", [{"attention": True}, {"kv_cache": True}, STATIC])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_attention_alone(save, batches, ids, tmp_path, scheme, options):
    """No layer at all is in FP8: what a model with an FP8 cache and nothing else is."""
    data = {"dataset": batches} if scheme == "static" else {}
    config = FP8Config(blocklist={"types": ["Linear"]}, activation_scheme=scheme, **options, **data)
    folder = save(llama())
    model = load(folder, config)
    report = quantization_report(model)
    assert not report.quantized and [row.quantized for row in report.attention] == [True, True]
    found = logits(model, ids)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), ids)
    assert 1e-4 < (found - expected).float().norm() / expected.float().norm() < 0.1
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(again, ids), found) and scales(again).keys() == scales(model).keys()
    by_hand = prepare(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), config.replace(dataset=None))
    for batch in batches if scheme == "static" else []:
        by_hand(**batch)
    assert torch.equal(logits(convert(by_hand), ids), found)


def test_a_fixed_scale_needs_no_data(ids):
    model = convert(llama(), FP8Config(scale_method="unit_scale", **STATIC))
    assert all(torch.equal(scale, torch.ones(1)) for scale in scales(model).values())
    assert torch.isfinite(logits(model, ids)).all()


def test_a_failed_conversion_changes_nothing(ids, monkeypatch):
    model = prepare(llama(), FP8Config(**STATIC))
    expected = logits(model, ids)
    monkeypatch.setattr("optimum_fp8.hf.attach.mark_as_quantized", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(model)
    monkeypatch.undo()
    assert not scales(model) and torch.equal(logits(model, ids), expected)
    assert quantization_report(model).attention[0].activations == "measuring"
    convert(model)
    assert scales(model)


def test_decoding_is_measured_too(save, tokenizer, tmp_path):
    folder = save(llama())
    options = {"dataset": ["a b c d e f" * 3], "tokenizer": tokenizer, **STATIC}
    name = "model.layers.0.self_attn"
    counts = []
    for steps in (0, 5):
        model = load(
            folder, FP8Config(decode_steps=steps, mode="MEASURE", dump_stats_path=tmp_path / "stats", **options)
        )
        tensors = state_of(model).measurements.tensors
        counts.append((seen(tensors[name, "q"]), seen(tensors[name, "k_cache"])))
        assert torch.equal(tensors[name, "k"].range(), tensors[name, "k_cache"].range())
    tokens = 33
    assert counts == [(tokens * 64, tokens * 32), ((tokens + 5) * 64, (tokens + 5) * 32)]


def test_padding_is_not_measured(tokenizer):
    """A padding token with a huge embedding leaves no trace, in prefill and while decoding."""
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.pad_token_id] = 50.0
        model.model.layers[0].input_layernorm.weight[0] = 30.0
    config = FP8Config(dataset=["abc", "a longer text"], tokenizer=tokenizer, batch_size=2, decode_steps=3, **STATIC)
    padded = state_of(calibrate(prepare(copy.deepcopy(model), config))).measurements
    single = state_of(
        calibrate(prepare(copy.deepcopy(model), config.replace(batch_size=1, decode_steps=0)))
    ).measurements
    name, prefill = "model.layers.0.self_attn", config.replace(decode_steps=0)
    without = state_of(calibrate(prepare(copy.deepcopy(model), prefill))).measurements
    for kind in ("q", "k", "v", "output", "k_cache", "v_cache"):
        torch.testing.assert_close(without.range(name, kind), single.range(name, kind))
        assert seen(without.tensors[name, kind]) == seen(single.tensors[name, kind])
    pads, heads = 10, {"k": 2, "q": 4}
    expected = seen(without.tensors[name, "k"]) + sum(2 * 13 + step - pads for step in (2, 4, 6)) * heads["k"] * 16
    assert seen(padded.tensors[name, "k"]) == expected


def test_attention_is_causal():
    """A registered attention without a mask of the same name would not be causal."""
    assert ALL_MASK_ATTENTION_FUNCTIONS["optimum_fp8"] is eager_mask
    ids = torch.randint(3, VOCABULARY, (1, 9))
    model = prepare(llama(), FP8Config(attention=True))
    changed = ids.clone()
    changed[0, -1] = 1
    assert torch.equal(logits(model, ids)[:, :-1], logits(model, changed)[:, :-1])


def test_a_module_may_have_scales_of_its_own_by_these_names(ids, save, tmp_path):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.k_scale = torch.nn.Parameter(torch.full((3,), 3.0))
        layer.self_attn.q_scale = 2.0
    prepare(model, FP8Config(attention=True))
    logits(model, ids)
    convert(model)
    attention = model.model.layers[1].self_attn
    assert attention.k_scale.tolist() == [3.0] * 3 and attention.q_scale == 2.0
    assert scales_of(attention)["k_scale"].shape == (1,)
    keys = set(model.state_dict())
    assert {"model.layers.1.self_attn.fp8_scales.k_scale"} <= keys
    assert next(row for row in quantization_report(model).attention).quantized


def test_torch_own_attention_is_a_layer_whose_products_stay(ids):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.attn = torch.nn.Linear(8, 8), torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.fc(x)
            return self.attn(x, x, x)[0]

    net = prepare(Net(), FP8Config(attention=True))
    net(torch.randn(1, 3, 8))
    report = quantization_report(convert(net))
    assert not report.attention and [row.name for row in report.quantized] == ["fc", "attn", "attn.out_proj"]
    assert "attention's own products in high precision" in report.quantized[1].scheme


def test_sub_models_get_the_implementation_too(save):
    family, config = FAMILIES["clip"], FP8Config(dataset=[FAMILIES["clip"].inputs], attention=True)
    model = family.model_class.from_pretrained(save(family.make()), quantization_config=config, dtype=torch.bfloat16)
    for part in (model.text_model, model.vision_model):
        assert part.config._attn_implementation == "optimum_fp8"
    assert len(quantization_report(model).attention) == 4
