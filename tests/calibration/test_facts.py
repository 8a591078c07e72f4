"""What is asked of a model before it is given data: where it is from, what it takes, how long texts may be."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration import facts_of
from optimum_fp8.calibration.facts import max_tokens
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQ2SEQ = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2} | {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 64,
}
BERT = SIZES | {"vocab_size": 64}


def clip():
    text = SIZES | {"vocab_size": 64, "max_position_embeddings": 77, "eos_token_id": 2}
    vision = SIZES | {"image_size": 8, "patch_size": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def roberta():
    return hf.RobertaModel(hf.RobertaConfig(**BERT, max_position_embeddings=34, pad_token_id=1)).eval()


def opt():
    config = hf.OPTConfig(
        hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, word_embed_proj_dim=16
    )
    return hf.OPTForCausalLM(copy.deepcopy(config)).eval()


def bart():
    return hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=40, pad_token_id=1)).eval()


def t5():
    config = hf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=64)
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config).eval()


def bert_to_bert():
    encoder = hf.BertConfig(**BERT, max_position_embeddings=20)
    decoder = hf.BertConfig(**BERT, max_position_embeddings=30, is_decoder=True, add_cross_attention=True)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return hf.EncoderDecoderModel(config).eval()


@pytest.mark.core
@pytest.mark.parametrize(
    "make, limit",
    [
        (clip, 77),
        (roberta, 32),
        (tiny_gpt2, 64),
        (tiny_bert, 64),
        (opt, 2048),
        (bart, 40),
        (bert_to_bert, 20),
        (tiny_llama, 64),
        (t5, None),
        (lambda: nn.Linear(2, 2), None),
    ],
)
def test_the_longest_text(make, limit):
    model = make()
    assert max_tokens(model) == limit
    with torch.device("meta"):
        assert max_tokens(make()) == limit, "known before weights are read"


@pytest.mark.parametrize("make", [clip, roberta, tiny_gpt2, tiny_bert, opt, bart, bert_to_bert])
def test_the_model_itself_takes_just_that(make):
    """The oracle for tables of positions: one token more is an error."""
    model = make()
    limit = max_tokens(model)

    @torch.no_grad()
    def run(length):
        inputs = {"input_ids": torch.full((1, length), 5)}
        if model.main_input_name == "input_ids" and hasattr(model, "visual_projection"):
            inputs["pixel_values"] = torch.zeros(1, 3, 8, 8)
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.full((1, 2), 5)
        model(**inputs)

    run(limit)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        run(limit + 1)


def test_of_several_main_inputs_the_first_is_the_main_one():
    model = nn.Linear(2, 2)
    model.main_input_name = ["pixel_values", "task_inputs"]  # as OneFormer says
    assert facts_of(model).main_input == "pixel_values"


def test_inputs_are_those_of_forward():
    assert {"labels", "decoder_input_ids"} < facts_of(t5()).inputs and facts_of(t5()).main_input == "input_ids"
    assert facts_of(tiny_llama()).takes("position_ids") and not facts_of(tiny_llama()).takes("label")
    assert facts_of(nn.Linear(2, 2)).main_input == "input"

    class Wrapper(nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    assert facts_of(Wrapper()).inputs is None and facts_of(Wrapper()).takes("anything")


def tokens_seen(model, dataset, **keys):
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    calibrate(prepare(model, FP8Config(dataset=dataset, **keys)))
    return seen


LONG = ["a b c " * 300]


@pytest.mark.core
@pytest.mark.parametrize("make, limit", [(roberta, 32), (tiny_gpt2, 64), (tiny_bert, 64), (tiny_llama, 64)])
def test_texts_are_cut_to_what_the_model_takes(make, limit, tokenizer, caplog):
    assert tokenizer.model_max_length > 10**20
    assert tokens_seen(make(), LONG, tokenizer=tokenizer) == [limit]
    assert f"texts are cut to {limit} tokens, not to max_seq_length=512: the model takes {limit}" in caplog.text


def test_texts_are_cut_to_what_the_tokenizer_says(tokenizer, caplog):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 9
    assert tokens_seen(tiny_bert(), LONG * 2, tokenizer=tokenizer) == [9, 9]
    assert caplog.text.count("texts are cut to 9 tokens, not to max_seq_length=512: the tokenizer's model_max") == 1


def test_what_was_asked_for_is_said_nothing_of(tokenizer, caplog):
    assert tokens_seen(tiny_bert(), [*LONG, "a b"], tokenizer=tokenizer, max_seq_length=10) == [10, 2]
    assert tokens_seen(tiny_bert(), ["a b"], tokenizer=tokenizer) == [2]
    assert "texts are cut" not in caplog.text


def test_decoding_finds_room_behind_the_text(tokenizer, caplog):
    seen = tokens_seen(tiny_gpt2(), LONG, tokenizer=tokenizer, attention=True, decode_steps=5)
    assert seen == [59, 1, 1, 1, 1, 1]
    assert (
        "texts are cut to 59 tokens, not to max_seq_length=512: the model takes 64, and decode_steps=5" in caplog.text
    )


@pytest.mark.core
@pytest.mark.parametrize("make, limit", [(roberta, 32), (tiny_gpt2, 64), (tiny_bert, 64), (bart, 40)])
def test_rows_that_are_too_long_say_both_numbers(make, limit):
    model = prepare(make(), FP8Config(dataset=[{"input_ids": torch.full((1, 70), 5)}]))
    with pytest.raises(FP8CalibrationError, match=f"rows of input_ids have 70 tokens, and the model takes {limit}:"):
        calibrate(model)


def test_rows_that_are_longer_than_a_model_was_made_for_go_through_where_it_computes_them():
    assert tokens_seen(tiny_llama(), [{"input_ids": torch.full((1, 100), 5)}]) == [100]


def test_clip_on_long_captions(tokenizer):
    from datasets import Dataset
    from PIL import Image

    class Processor:
        """Texts and images as a processor of transformers takes them."""

        def __call__(self, images, text, padding, truncation, max_length, return_tensors):
            given = tokenizer(
                text, padding=padding, truncation=truncation, max_length=max_length, return_tensors=return_tensors
            )
            return {**given, "pixel_values": torch.stack([torch.ones(3, 8, 8) for _ in images])}

    rows = Dataset.from_dict({"text": LONG, "image": [Image.new("RGB", (8, 8))]})
    model = clip()
    assert tokens_seen(model, rows, processor=Processor()) == [77]
    measured = state_of(model).measurements
    for part in ("text", "vision"):
        assert measured.range(f"{part}_model.encoder.layers.0.mlp.fc1") is not None
