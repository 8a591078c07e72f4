"""A checkpoint with the scales of another target or method, against quantizing the original for it."""

from __future__ import annotations

import pytest
import torch
from grids import slow_but
from rescaling.conftest import ATTENTION, TINY_LM, assert_same_tensors, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fp8 import (
    FP8CheckpointError,
    FP8Config,
    FP8ConfigError,
    FP8MeasurementError,
    convert,
    rescale,
    save,
)
from optimum_fp8.checkpoint.provenance import provenance_of
from optimum_fp8.modules import fp8_modules
from optimum_fp8.modules.handler import converted_modules

MOVES = [("gaudi2", "gaudi3"), ("gaudi3", "gaudi2")]


@pytest.fixture(scope="module")
def held_out():
    tokens = AutoTokenizer.from_pretrained(TINY_LM)((TINY_LM / "heldout.txt").read_text()[:12000])["input_ids"]
    return torch.tensor(tokens[: 6 * 256]).reshape(6, 256)


@torch.no_grad()
def log_p(folder, ids):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits.float().log_softmax(-1)


def perplexity(log_probabilities, ids) -> float:
    taken = log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])
    return torch.exp(-taken.mean()).item()


def kl(found, expected) -> float:
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


@pytest.mark.core
@pytest.mark.parametrize("before, after", slow_but(MOVES, MOVES[0]))
def test_from_the_original_it_is_to_the_bit_what_quantizing_it_gives(lm, tmp_path, before, after):
    made = rescale(lm(target=before), tmp_path / "out", target=after, original=TINY_LM)
    assert_same_tensors(tmp_path / "out", lm(target=after))
    assert made.rows == () and made.original == str(TINY_LM) and made.output == str(tmp_path / "out")
    found, direct = provenance_of(tmp_path / "out"), provenance_of(lm(target=after))
    assert found["modules"] == direct["modules"] and found["config"] == direct["config"]
    (change,) = found["changes"]
    assert (change["what"], change["target"], change["before"]) == ("rescaled", after, {"target": before})
    assert change["original"] == "tiny_lm"


def test_another_method_from_the_original_is_to_the_bit_that_method(lm, tmp_path):
    method = "act_maxabs_hw_weights_pcs_maxabs_pow2"
    rescale(lm(target="gaudi2"), tmp_path / "out", target="gaudi3", scale_method=method, original=TINY_LM)
    assert_same_tensors(tmp_path / "out", lm(target="gaudi3", scale_method=method))


@pytest.mark.core
@pytest.mark.parametrize("before, after", slow_but(MOVES, MOVES[1]))
def test_without_the_original_it_is_what_loading_for_the_target_gives(lm, tmp_path, before, after):
    made = rescale(lm(target=before), tmp_path / "out", target=after)
    config = FP8Config(target=after)
    AutoModelForCausalLM.from_pretrained(lm(target=before), quantization_config=config).save_pretrained(
        tmp_path / "loaded"
    )
    assert_same_tensors(tmp_path / "out", tmp_path / "loaded")
    assert len(made.rows) == 28 and made.error < 1e-4
    assert bool(made.rounded) == (after == "gaudi2")


def test_there_and_back_again_loses_nothing(lm, tmp_path):
    rescale(lm(target="gaudi2"), tmp_path / "3", target="gaudi3")
    rescale(tmp_path / "3", tmp_path / "2", target="gaudi2")
    assert_same_tensors(tmp_path / "2", lm(target="gaudi2"))
    assert [each["target"] for each in provenance_of(tmp_path / "2")["changes"]] == ["gaudi3", "gaudi2"]


@pytest.mark.slow
@pytest.mark.parametrize("before, after", MOVES)
def test_the_language_model_is_as_good_as_one_quantized_for_the_target(lm, held_out, tmp_path, before, after):
    rescale(lm(target=before), tmp_path / "out", target=after)
    plain, direct = log_p(TINY_LM, held_out), log_p(lm(target=after), held_out)
    source, found = log_p(lm(target=before), held_out), log_p(tmp_path / "out", held_out)
    worst = max(kl(direct, plain), kl(source, plain))
    assert 0 < kl(found, plain) <= 1.1 * worst
    assert perplexity(found, held_out) <= 1.005 * max(perplexity(direct, held_out), perplexity(source, held_out))


def test_run_time_scales_are_those_of_the_method_whatever_the_weights(lm, tmp_path):
    made = rescale(lm(target="gaudi2"), tmp_path / "out", target="gaudi3", scale_method="maxabs_pow2")
    found, direct = tensors(tmp_path / "out"), tensors(lm(target="gaudi3", scale_method="maxabs_pow2"))
    scales = [name for name in direct if name.endswith("_scale") and not name.endswith("weight_scale")]
    assert len(scales) > 40 and all(torch.equal(found[name], direct[name]) for name in scales)
    assert not made.rounded  # hardware scales are powers of two
    rescale(tmp_path / "out", tmp_path / "hw", target="gaudi2", scale_method="maxabs_hw")
    again, source = tensors(tmp_path / "hw"), tensors(lm(target="gaudi2"))
    assert all(torch.equal(again[name], source[name]) for name in source if name.endswith("_scale"))


@pytest.mark.core
def test_what_comes_out_is_a_whole_checkpoint(fp8, batches, tmp_path, capsys):
    source = fp8(FP8Config(dataset=batches, target="gaudi2", **ATTENTION))
    (source / "tokenizer.json").write_text("{}")
    rescale(source, tmp_path / "out", target="cpu", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2 and (tmp_path / "out" / "tokenizer.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {module.scheme.fmt.target for module in fp8_modules(model).values()} == {"cpu"}
    assert len(converted_modules(model)) == 16
    assert not list(tmp_path.glob(".fp8-*"))


def test_a_method_that_was_said_for_single_modules_gives_way(fp8, batches, tmp_path):
    overrides = {"down_proj": {"scale_method": "maxabs_arbitrary"}, "up_proj": {"input_backoff": 0.5}}
    source = fp8(FP8Config(dataset=batches, target="gaudi3", overrides=overrides))
    made = rescale(source, tmp_path / "out", scale_method="maxabs_pow2")
    schemes = {
        name: m.scheme for name, m in fp8_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).items()
    }
    assert {scheme.weight.rounding for scheme in schemes.values()} == {"pow2"}
    assert {scheme.input.backoff for name, scheme in schemes.items() if "up_proj" in name} == {0.5}
    assert all("down_proj" in row.module for row in made.rounded) and len(made.rounded) == 2 and made.error < 0.05


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "nothing to change"),
        ({"scale_method": "maxabs_pow3"}, "maxabs_pow3.*is unknown.*maxabs_pow2"),
        ({"scale_method": {"default": "maxabs_pow2"}}, "expected the name of one"),
        ({"target": "gaudi4"}, "gaudi4"),
    ],
    ids=str,
)
def test_keys_that_are_wrong_are_told_before_anything_is_read(keys, message, tmp_path):
    with pytest.raises(FP8ConfigError, match=message):
        rescale(tmp_path / "nothing", tmp_path / "out", **keys)


def test_a_folder_that_is_there_or_is_no_checkpoint_of_ours(save, fp8, tmp_path):
    from hf.conftest import llama

    (tmp_path / "out").mkdir()
    with pytest.raises(FP8CheckpointError, match="out exists: choose another folder"):
        rescale(tmp_path, tmp_path / "out", target="cpu")
    with pytest.raises(FP8CheckpointError, match="nothing is not a folder"):
        rescale(tmp_path / "nothing", tmp_path / "new", target="cpu")
    with pytest.raises(FP8CheckpointError, match=r"holds no FP8 checkpoint of optimum_fp8 .*quant_method=None"):
        rescale(save(llama()), tmp_path / "new", target="cpu")


def test_an_original_that_is_larger(lm, save, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype="auto")
    model.model.layers[2].mlp.up_proj.weight.data *= 1.05
    with pytest.raises(FP8CheckpointError, match=r"layers.2.mlp.up_proj is 1.0\d+ times as large"):
        rescale(lm(activation_scheme="dynamic"), tmp_path / "out", target="gaudi2", original=save(model))


def test_a_checkpoint_of_another_maker_is_pointed_to_native_config(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}', encoding="utf-8")
    with pytest.raises(FP8CheckpointError, match="optimum_fp8.native_config"):
        rescale(tmp_path, tmp_path / "out", target="gaudi2")


def test_what_save_wrote_of_another_module_is_pointed_to_load(tmp_path):
    save(convert(torch.nn.Sequential(torch.nn.Linear(8, 8)), FP8Config(activation_scheme="dynamic")), tmp_path / "m")
    with pytest.raises(FP8CheckpointError, match="what optimum_fp8.save wrote is loaded by load"):
        rescale(tmp_path / "m", tmp_path / "out", target="gaudi2")


def test_without_a_record_of_ranges_static_scales_are_an_error(tmp_path):
    from checkpoint.version_1_models import DATA

    with pytest.raises(FP8MeasurementError, match="holds no ranges of .* modules .*which static scales follow from"):
        rescale(DATA / "llama_static", tmp_path / "out", scale_method="maxabs_pow2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("shape", r"model\.embed_tokens\.weight is .*, and in the checkpoint"),
        ("norm", r"model\.norm\.weight has other values"),
        ("fingerprint", "its fingerprint is"),
        ("weight", r"the weight of model\.layers\.1\.mlp\.up_proj differs by"),
    ],
)
def test_an_original_that_is_none(fp8, save, batches, tmp_path, changed, message):
    from hf.conftest import llama

    data = {"dataset": batches} if changed == "fingerprint" else {"activation_scheme": "dynamic"}
    source = fp8(FP8Config(target="gaudi3", **data))
    torch.manual_seed(0)
    other = llama(**({"vocab_size": 64} if changed == "shape" else {}))
    with torch.no_grad():
        if changed == "norm":
            other.model.norm.weight.add_(1)
        elif changed != "shape":
            other.model.layers[1].mlp.up_proj.weight.neg_()
    with pytest.raises(FP8CheckpointError, match=f"is not the model that the checkpoint was made from: {message}"):
        rescale(source, tmp_path / "out", target="gaudi2", original=save(other, name="other"))
    assert not (tmp_path / "out").exists()


def test_an_original_that_is_quantized_itself(fp8, tmp_path):
    source = fp8(FP8Config(target="gaudi3", activation_scheme="dynamic"))
    with pytest.raises(FP8CheckpointError, match="quantized already"):
        rescale(source, tmp_path / "out", target="gaudi2", original=source)


def test_what_a_checkpoint_has_already_is_no_change(lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = lm(target="gaudi2")
    for keys in (
        {"target": "gaudi2"},
        {"scale_method": "maxabs_hw"},
        {"target": "gaudi2", "scale_method": "MAXABS_HW"},
    ):
        with pytest.raises(FP8ConfigError, match="rescale: nothing to change: the checkpoint has .*the original"):
            rescale(source, tmp_path / "out", **keys)
    rescale(source, tmp_path / "out", target="gaudi2", original=TINY_LM)
    assert_same_tensors(tmp_path / "out", source)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]  # no measurements


def test_an_index_that_is_not_there_is_named(fp8, save, tmp_path):
    source = fp8(FP8Config(activation_scheme="dynamic", target="gaudi3"))
    rescale(source, tmp_path / "shards", target="gaudi2", max_shard_size="20KB")
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    with pytest.raises(FP8CheckpointError, match=r"shards/model\.safetensors\.index\.json does not exist"):
        rescale(tmp_path / "shards", tmp_path / "out", target="gaudi3")
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(tmp_path / "fp8-plain").save_pretrained(plain, max_shard_size="20KB")
    (plain / "model.safetensors.index.json").unlink()
    with pytest.raises(FP8CheckpointError, match=r"plain/model\.safetensors\.index\.json does not exist"):
        rescale(source, tmp_path / "out", target="gaudi2", original=plain)
