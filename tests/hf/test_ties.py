"""Output heads in FP8 that were tied to the embedding: as the model computes with the tie, before and after saving."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from grids import slow_but
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize
from optimum_fp8.formats import is_fp8
from optimum_fp8.hf.ties import tied_modules, untie
from optimum_fp8.modules import fp8_modules

IDS = {"input_ids": torch.arange(3, 27).view(2, 12)}
BOTH = IDS | {"decoder_input_ids": IDS["input_ids"]}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
BART |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
GEMMA = {"module_config": SIZES | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}}


def t5gemma() -> Any:
    parts = {part: copy.deepcopy(GEMMA["module_config"]) for part in ("encoder", "decoder")}
    return hf.T5GemmaConfig(**parts, tie_word_embeddings=True, vocab_size=64)


# family: (model class, its config, inputs); T5, UMT5, Switch and T5Gemma scale by config.tie_word_embeddings
TIED: dict[str, tuple[Any, Any, dict[str, torch.Tensor]]] = {
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5), BOTH),
    "umt5": (hf.UMT5ForConditionalGeneration, hf.UMT5Config(**T5, tie_word_embeddings=True), BOTH),
    "switch": (hf.SwitchTransformersForConditionalGeneration, hf.SwitchTransformersConfig(**T5, num_experts=2), BOTH),
    "t5gemma": (hf.T5GemmaForConditionalGeneration, t5gemma(), BOTH),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**BART), BOTH),
    "marian": (hf.MarianMTModel, hf.MarianConfig(**BART, pad_token_id=0, decoder_start_token_id=0), BOTH),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES, tie_word_embeddings=True), IDS),
    "bert, tied bias": (hf.BertForMaskedLM, hf.BertConfig(**SIZES), IDS),
}
CONFIG = FP8Config(activation_scheme="weight_only", quantize_lm_head=True)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def tied_heads(model: Any) -> list[str]:
    return [name for name in tied_modules(model) if isinstance(model.get_submodule(name), nn.Linear)]


@pytest.mark.core
@pytest.mark.parametrize("how", ["from_pretrained", pytest.param("convert", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", slow_but(TIED, "t5", "bart", "llama", "bert, tied bias"))
def test_a_head_in_fp8_computes_as_it_did_when_it_was_tied(save, tmp_path, family, how, caplog):
    model_class, config, inputs = TIED[family]
    original = model_class(config).eval()
    (head,), expected, folder = tied_heads(original), logits(original, inputs), save(original, torch.float32)
    if how == "from_pretrained":
        model = model_class.from_pretrained(folder, quantization_config=CONFIG)
    else:
        model = convert(model_class.from_pretrained(folder), CONFIG)
    assert head in fp8_modules(model) and head not in tied_modules(model)
    assert model.config.tie_word_embeddings == original.config.tie_word_embeddings
    found = logits(model, inputs)
    assert error(found, expected) < 0.1

    for name in ("fp8", "again"):  # also what was reloaded can be saved
        model.save_pretrained(tmp_path / name)
        caplog.clear()
        model, info = model_class.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and "tie" not in caplog.text
        assert torch.equal(logits(model, inputs), found)
        model.tie_weights()  # as resizing the embeddings does
        assert is_fp8(model.get_submodule(head).codes.dtype)
        assert torch.equal(logits(copy.deepcopy(model), inputs), found)

    assert tied_modules(dequantize(model)) == tied_modules(original), "the head is tied again"
    for target, source in original.all_tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(source)
    plain = model_class.from_pretrained(tmp_path / "fp8", quantization_config=FP8Config(dequantize=True))
    assert tied_modules(plain) == tied_modules(original)
    assert torch.equal(logits(plain, inputs), logits(model, inputs)) and error(logits(plain, inputs), expected) < 0.1


class Heads(hf.LlamaPreTrainedModel):
    """Heads that are tied to each other by a pattern, as those of detectors are."""

    _tied_weights_keys = {r"heads.(?![0])\d+": r"heads.0"}

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.first = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.heads = nn.ModuleList(nn.Linear(32, 8) for _ in range(3))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        hidden = self.first(self.embed(input_ids))
        return torch.cat([head(hidden) for head in self.heads], -1)


@pytest.mark.parametrize("how", ["from_pretrained", "convert"])
def test_layers_tied_to_each_other(save, tmp_path, how):
    original = Heads(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    folder, ids = save(original, torch.float32), IDS["input_ids"]
    model = Heads.from_pretrained(folder, **({"quantization_config": CONFIG} if how == "from_pretrained" else {}))
    model = model if how == "from_pretrained" else convert(model, CONFIG)
    assert len(fp8_modules(model)) == 4
    with torch.no_grad():
        found = model(ids)
        assert error(found, original(ids)) < 0.1
        model.save_pretrained(tmp_path / "fp8")
        assert torch.equal(Heads.from_pretrained(tmp_path / "fp8")(ids), found)
    assert all(head.weight is model.heads[0].weight for head in dequantize(model).heads)


def test_targets_that_lose_their_source_stay_tied_to_each_other():
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5))
    before = dict(model.all_tied_weights_keys)
    changes = untie(model, ["shared"])
    assert tied_modules(model) == {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == model.all_tied_weights_keys
    for change in reversed(changes):
        change.undo()
    assert model.all_tied_weights_keys == before and not untie(model, ["lm_head.none"])
