"""The census' own logic: what counts as eligible, the independent quantization, tiny configurations, rows that fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from moe_models import tiny_moe
from torch import nn

from benchmarks.census import build, fake, flow, processes, shrink, table
from benchmarks.census.eligible import coverage, weights
from benchmarks.census.pairs import Pair, pairs
from optimum_fp8 import FP8Config, convert

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BERT = Pair("bert", "BertForMaskedLM", ("MASKED_LM",))

# Forty of all kinds: text, encoder-decoders, mixtures, states, images, audio, several modalities.
SAMPLE = {
    "text": ("BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    "more text": ("OlmoForCausalLM", "PhiForCausalLM", "FalconForCausalLM", "BloomForCausalLM", "OPTForCausalLM"),
    "heads": ("BertForQuestionAnswering", "RobertaForTokenClassification", "DistilBertForSequenceClassification"),
    "encoder-decoder": ("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"),
    "mixtures": ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM"),
    "states": ("Mamba2ForCausalLM", "JambaForCausalLM", "BambaForCausalLM", "Lfm2ForCausalLM"),
    "images": ("ViTForImageClassification", "DeiTForImageClassification", "Dinov2Model", "SwinForImageClassification"),
    "more images": ("ResNetForImageClassification", "SegformerForSemanticSegmentation", "YolosForObjectDetection"),
    "audio": ("WhisperForConditionalGeneration", "Wav2Vec2ForCTC", "HubertForCTC"),
    "modalities": ("CLIPModel", "SiglipModel", "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"),
    "more modalities": ("Qwen2VLForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
}


def test_pairs_are_the_classes_behind_the_auto_classes_and_the_telling_one_is_first():
    found = [pair for pair in pairs() if pair.model_type == "bert"]
    assert found[0].autos == ("CAUSAL_LM",) and found[-1] == Pair("bert", "BertModel", ("MODEL", "TEXT_ENCODING"))
    assert {hf.AutoModelForCausalLM._model_mapping[hf.LlamaConfig].__name__} == {
        pair.class_name for pair in pairs() if pair.model_type == "llama" and "CAUSAL_LM" in pair.autos
    }


def test_configurations_shrink_in_proportion_and_keep_every_kind_of_layer():
    default = shrink.default("gemma3_text")
    small = shrink.proportional(default)
    ratio = default["hidden_size"] // small["hidden_size"]
    assert ratio > 1 and default["intermediate_size"] == ratio * small["intermediate_size"]
    assert set(small["layer_types"]) == set(default["layer_types"])
    assert len(small["layer_types"]) == small["num_hidden_layers"] == 2
    assert small["vocab_size"] == shrink.VOCABULARY and default["vocab_size"] > shrink.VOCABULARY
    heads = shrink.proportional(default, fewer_heads=True)
    assert heads["head_dim"] == default["head_dim"] and heads["num_attention_heads"] < default["num_attention_heads"]


def test_placeholders_for_images_are_as_many_as_the_model_wants():
    built = build.build(Pair("llava", "LlavaForConditionalGeneration", ("IMAGE_TEXT_TO_TEXT",)))
    first, second = built.batches
    token = built.model.config.image_token_id
    patches = (built.model.config.vision_config.image_size // built.model.config.vision_config.patch_size) ** 2
    wanted = patches * len(first["pixel_values"])
    assert [(batch["input_ids"] == token).sum() for batch in (first, second)] == [wanted, wanted]
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_rounding_and_dequantizing_by_hand():
    x, scale = torch.tensor([0.3, -1.0, 1000.0, 17.0]), torch.tensor([0.5])
    # 0.6 lies between 0.5625 and 0.625; 2000 saturates at 448; 34 between 32 and 36, a tie, goes to the even 32
    assert fake.rounded(x, scale).tolist() == [0.3125, -1.0, 224.0, 16.0]
    codes = torch.tensor([[1.0, 2.0], [4.0, -448.0]]).to(torch.float8_e4m3fn)
    assert fake.dequantized(codes, torch.tensor([[2.0], [0.5]])).tolist() == [[2.0, 4.0], [2.0, -224.0]]


def test_the_independent_quantization_of_a_layer_is_what_is_worked_out_by_hand():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    state = {
        "0.weight": torch.tensor([[[2.0, -4.0]]]).to(torch.float8_e4m3fn),
        "0.weight_scale": torch.tensor([0.25]),
        "0.input_scale": torch.tensor([0.5]),
    }
    assert fake.quantize_in_place(model, state) == ["0.weight"]
    assert model(torch.tensor([[0.3, 17.0]])).item() == 0.5 * 0.3125 - 1.0 * 16.0


def test_what_is_left_out_by_default_is_not_eligible_and_what_cannot_be_converted_is():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    original = nn.Sequential(nn.Linear(8, 8), Own(8, 8), nn.Embedding(4, 8))
    assert list(weights(original)) == ["0.weight", "1.weight"]
    assert set(weights(tiny_moe("mixtral"))) > {"model.layers.0.mlp.experts.gate_up_proj"}
    quantized = convert(nn.Sequential(*(type(each)(*each.weight.shape) for each in original)), FP8Config())
    found = coverage(original, quantized, {"0", "1"})
    assert (found.eligible, found.in_fp8, found.share) == (512, 256, 0.5)
    assert found.left == {"Own has a forward of its own": 256}


def test_a_row_passes_or_says_why_it_does_not(tmp_path, monkeypatch):
    assert flow.census_row(BERT)["status"] == "pass"
    monkeypatch.setattr(fake, "quantize_in_place", lambda model, state: [])  # then the two differ
    row = flow.census_row(BERT)
    assert row["status"] == "fail" and row["stage"] == "compare" and "done independently" in row["cause"]
    unknown = flow.census_row(Pair("bert", "BertForNothing", ("MODEL",)))
    assert unknown["status"] == "not built" and "BertForNothing" in unknown["cause"]


def test_a_process_that_ends_badly_costs_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "census_row", lambda pair: processes.os._exit(3) if pair == BERT else {"status": "pass"})
    processes.run([BERT], tmp_path / "rows.jsonl")
    (row,) = processes.read(tmp_path / "rows.jsonl").values()
    assert row["status"] == "fail" and row["stage"] == "process"


def test_the_table_and_the_page_say_what_the_rows_say():
    rows = [json.loads(line) for line in (RESULTS / "census.jsonl").read_text().splitlines()]
    said = table.sentence(rows, pairs()) if hf.__version__ == "5.24.0" else ""
    assert said in (RESULTS / "census.md").read_text()
    assert said in " ".join((ROOT / "docs" / "architectures.md").read_text().split())
    for row in rows:
        assert row["status"] in table.STATUSES and (row["status"] == "pass" or row["cause"])
        assert row["status"] != "pass" or row["share"] >= flow.LEAST_SHARE


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_of_all_kinds_passes(kind):
    known = {pair.class_name: pair for pair in reversed(pairs())}
    rows = [flow.census_row(known[name]) for name in SAMPLE[kind]]
    assert [(row["class_name"], row["stage"], row["cause"]) for row in rows if row["status"] != "pass"] == []
