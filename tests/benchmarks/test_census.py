"""The census' own logic: what counts as eligible, the independent quantization, tiny configurations, rows that fail."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from moe_models import tiny_moe
from torch import nn

from benchmarks.census import build, complete, fake, flow, inputs, processes, shrink, table
from benchmarks.census.eligible import called, codes_of, coverage, weights
from benchmarks.census.pairs import Pair, loading_class, pairs
from optimum_fp8 import FP8Config, convert, prepare

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


def test_auto_classes_are_found_by_the_configuration_of_the_model():
    assert loading_class(BERT, hf.BertConfig()) is hf.AutoModelForMaskedLM
    text = Pair("mllama", "MllamaForCausalLM", ("CAUSAL_LM",))
    assert loading_class(text, hf.MllamaTextConfig()) is hf.MllamaForCausalLM, "no auto class knows its configuration"


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


def test_what_defaults_leave_open_is_filled_and_what_has_to_fit_still_fits():
    part = {"hidden_size": 24, "num_groups": 32, "pad_token_id": None, "head_dim": None, "num_key_value_heads": None}
    part["backbone_config"] = {"model_type": "timm_backbone", "out_indices": [3, 4]}
    complete.complete(part, part | {"hidden_size": 768}, width=24, heads=3)
    complete.own_backbone(part)
    assert (part["num_groups"], part["pad_token_id"], part["head_dim"], part["num_key_value_heads"]) == (8, 0, 8, 3)
    assert part["backbone_config"]["out_features"] == ["stage3", "stage4"]


def test_a_class_gets_the_configuration_of_its_kind_from_inside_another():
    whole = hf.Llama4Config()
    assert build.config_for(hf.Llama4ForCausalLM, whole) is whole.text_config
    assert build.config_for(hf.Llama4ForConditionalGeneration, whole) is whole


def test_inputs_get_the_width_that_an_error_tells():
    given = {"input_ids": torch.zeros(1, 80).long(), "input_features": torch.zeros(1, 96, 80)}
    wider = inputs.with_width(given, "mat1 and mat2 shapes cannot be multiplied (96x80 and 320x64)")
    assert wider["input_features"].shape == (1, 96, 320) and wider["input_ids"] is given["input_ids"]
    other = "expected input[1, 96, 80] to have 20 channels, but got 96 channels instead"
    assert inputs.with_width(given, other)["input_features"].shape == (1, 20, 80)
    assert inputs.with_width(given, "something else") is None


def test_several_choices_are_given_where_one_text_is_not_enough():
    batch = build.build(Pair("bert", "BertForMultipleChoice", ("MULTIPLE_CHOICE",))).batches[0]
    assert batch["input_ids"].ndim == 3 and not torch.equal(batch["input_ids"][:, 0], batch["input_ids"][:, 1])


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


@pytest.mark.parametrize("groups", [1, 2])
def test_codes_of_transposed_convolutions_are_turned_back(groups):
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=groups))
    x, weight = torch.randn(1, 4, 3, 3), model[0].weight.detach().clone()
    expected = model(x)
    codes = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        fake._replace(model[0], "weight", codes, torch.ones(1))
    assert torch.equal(model(x), expected)


def test_the_independent_quantization_of_a_layer_is_what_is_worked_out_by_hand():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    state = {
        "0.weight": torch.tensor([[[2.0, -4.0]]]).to(torch.float8_e4m3fn),
        "0.weight_scale": torch.tensor([0.25]),
        "0.input_scale": torch.tensor([0.5]),
    }
    assert fake.quantize_in_place(model, state) == ["0.weight"]
    assert model(torch.tensor([[0.3, 17.0]])).item() == 0.5 * 0.3125 - 1.0 * 16.0


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(4, 4, 3),
        nn.ConvTranspose2d(3, 5, 2),
        nn.Conv1d(4, 6, 3, groups=2),
    ],
)
def test_the_independent_quantization_puts_weights_of_convolutions_where_they_were(layer):
    original, before = nn.Sequential(layer), layer.weight.clone()
    quantized = convert(copy.deepcopy(original), FP8Config(activation_scheme="weight_only"))
    assert fake.quantize_in_place(original, codes_of(quantized)) == ["0.weight"]
    assert 0 < (layer.weight - before).norm() < 0.05 * before.norm()


@torch.no_grad()
def test_the_independent_quantization_of_a_stack_with_rows_for_no_expert():
    stack = nn.Module()
    stack.gate_up_proj = nn.Parameter(torch.ones(3, 2, 2))
    codes = torch.full((2, 2, 2), 4.0).to(torch.float8_e4m3fn)
    fake.quantize_in_place(
        nn.Sequential(stack), {"0.gate_up_proj": codes, "0.gate_up_proj_scale": torch.full((2, 2, 1), 0.5)}
    )
    assert stack.gate_up_proj[:, 0, 0].tolist() == [2.0, 2.0, 1.0]


@torch.no_grad()
def test_weights_alone_leave_inputs_as_they_are():
    codes = torch.tensor([[2.0, -4.0]]).to(torch.float8_e4m3fn)
    state = {"0.weight": codes, "0.weight_scale": torch.tensor([0.25]), "0.input_scale": torch.tensor([0.5])}
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    fake.quantize_in_place(model, state, round_inputs=False)
    assert model(torch.tensor([[0.25, 17.0]])).item() == 0.125 - 17.0


class Bare(nn.Sequential):
    """Takes a tensor by name, and gives back what transformers' models do."""

    def forward(self, x):
        found = super().forward(x)
        return {"logits": found, "attentions": (found,), "cache": found}


def test_what_is_compared_is_what_every_attention_returns():
    output = Bare(nn.Linear(2, 2))(torch.ones(1, 2))
    assert [each is output["logits"] for each in inputs.tensors(output)] == [True]


def test_inputs_of_which_a_layer_gets_nan_are_refused():
    model = Bare(nn.LayerNorm(2), nn.Linear(2, 2))
    inputs.runs(model, {"x": torch.tensor([[1.0, 2.0]])})
    with pytest.raises(ValueError, match="a Linear is given NaN"):
        inputs.runs(model, {"x": torch.tensor([[1.0, torch.inf]])})
    assert not model[1]._forward_pre_hooks


def test_modules_that_are_given_nothing_are_not_reached():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    reached = called(model, lambda: [model[0](torch.ones(1, 2)), model[1](torch.ones(0, 2))])
    assert reached == {"0"}


def test_a_reloaded_original_runs_in_float32_or_is_not_built():
    class Saved:
        lost: list[str] = []
        layer = nn.Linear(2, 2)

        @classmethod
        def from_pretrained(cls, folder, *, dtype, output_loading_info):
            return Bare(copy.deepcopy(cls.layer)), {"missing_keys": cls.lost, "unexpected_keys": []}

    built = build.Built(None, [{"x": torch.ones(1, 2)}], torch.bfloat16)
    assert flow._runs_in(Saved, "", built) is torch.float32, "its layer stays in float32, as DeBERTa's embeddings do"
    Saved.layer = nn.Linear(3, 2)
    with pytest.raises(build.CannotBuild, match="bfloat16: RuntimeError.*float32: RuntimeError"):
        flow._runs_in(Saved, "", built)
    Saved.lost = ["0.bias"]
    with pytest.raises(build.CannotBuild, match=r"1 weights are lost.*0\.bias"):
        flow._runs_in(Saved, "", built)


def test_shapes_that_values_tell_are_not_compared():
    exact, other = [torch.ones(2, 3), torch.ones(4)], [torch.ones(2, 3), torch.ones(5)]
    assert flow.of_fixed_shape(other, other, exact) == [0]
    for found in (exact, [torch.ones(2, 3), torch.ones(6)]):
        with pytest.raises(flow.Wrong, match="outputs of different shapes"):
            flow.of_fixed_shape(found, other, exact)


def test_eager_attention_is_a_reference_where_it_computes_the_same():
    x = torch.tensor([1.0, torch.nan])
    assert flow.alike([x], [x + 1e-4]) and not flow.alike([x], [torch.tensor([torch.nan, 1.0])])
    assert not flow.alike([x], [x, x]) and not flow.alike([x], [x + 0.5])


def test_what_is_left_out_by_default_is_not_eligible_and_what_cannot_be_converted_is():
    class Own(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight) + 1

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
@pytest.mark.parametrize(
    "pair, status, told",
    [
        (Pair("ibert", "IBertModel", ("MODEL",)), "nothing", "stay in high precision by default"),
        (Pair("deberta", "DebertaModel", ("MODEL",)), "pass", ""),
        (Pair("mllama", "MllamaForCausalLM", ("CAUSAL_LM",)), "pass", ""),
    ],
)
def test_what_transformers_itself_does_is_found_out(pair, status, told):
    row = flow.census_row(pair)
    assert row["status"] == status and told in row["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_of_all_kinds_passes(kind):
    known = {pair.class_name: pair for pair in reversed(pairs())}
    rows = [flow.census_row(known[name]) for name in SAMPLE[kind]]
    assert [(row["class_name"], row["stage"], row["cause"]) for row in rows if row["status"] != "pass"] == []


def test_the_independent_quantization_knows_attention_and_recurrent_layers_of_torch():
    plain = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2, batch_first=True), "lstm": nn.LSTM(32, 16)}).eval()
    other, x = copy.deepcopy(plain), torch.randn(2, 5, 32)
    model = prepare(plain, FP8Config())
    model["attention"](x, x, x), model["lstm"](x)
    model = convert(model)
    done = fake.quantize_in_place(other, codes_of(model))
    assert done == ["attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    for name, args in (("attention", (x, x, x)), ("lstm", (x,))):
        found, expected = model[name](*args)[0], other[name](*args)[0]
        assert (found - expected).norm() / expected.norm() < 0.04  # torch gives out_proj its input unrounded


def test_what_transformers_cannot_load_in_high_precision_is_not_built():
    class Unloadable:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise AttributeError("no such thing")

    with pytest.raises(build.CannotBuild, match="what is saved cannot be loaded: AttributeError: no su"):
        flow._plain(Unloadable, "folder", torch.float32)
