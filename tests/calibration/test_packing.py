"""Packing: full samples without padding, every token in its order."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import check_dataset, facts_of
from optimum_fp8.errors import FP8CalibrationError

TEXTS = ["a b", "", "c", "x y z", "a", "b c a"]
LLAMA = facts_of(tiny_llama())


@pytest.fixture
def pack(load):
    """`pack(texts, length)`: the samples of so many tokens."""

    def pack(texts, length, model=LLAMA, **keys):
        return load(texts, model, concatenate_data=True, max_seq_length=length, **keys)

    return pack


@pytest.mark.core
@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_samples_are_full_and_in_order(length, batch_size, pack, chat_tokenizer):
    found = pack(TEXTS, length, tokenizer=chat_tokenizer, batch_size=batch_size)
    stream = chat_tokenizer(" </s> ".join(text for text in TEXTS if text))["input_ids"]
    rows = torch.cat([batch["input_ids"] for batch in found])
    assert rows.flatten().tolist() == stream[: len(stream) // length * length] and rows.shape[1] == length
    assert all(bool(batch["attention_mask"].all()) for batch in found)


def test_without_an_eos_texts_follow_each_other(pack, tokenizer):
    (batch, _) = pack(["a", "b", "c a"], 2, tokenizer=tokenizer)
    assert batch["input_ids"].tolist() == [[2, 3]]


def test_conversations_are_packed_too(pack, chat_tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = pack([chat, chat], 4, tokenizer=chat_tokenizer)
    assert [chat_tokenizer.decode(batch["input_ids"][0]) for batch in found] == [
        "<user> a </s> <assistant>",
        "b </s> <user> a",
        "</s> <assistant> b </s>",
    ]


@pytest.mark.core
def test_no_more_texts_are_read_than_needed(chat_tokenizer):
    read = []

    def stream():
        for number in range(100):
            read.append(number)
            yield "a b c"

    keys = {"max_seq_length": 4, "num_calibration_samples": 3, "concatenate_data": True}
    config = FP8Config(dataset=stream(), tokenizer=chat_tokenizer, **keys)
    assert len(list(check_dataset(config.dataset).opened(config.dataset, config, LLAMA))) == 3
    assert len(read) == 4


def test_samples_are_as_long_as_the_model_takes(pack, chat_tokenizer, caplog):
    assert {batch["input_ids"].shape[1] for batch in pack(["a b c"] * 50, 512, tokenizer=chat_tokenizer)} == {64}
    assert "texts are cut to 64 tokens, not to max_seq_length=512: the model takes 64" in caplog.text
    options = {"attention": True, "decode_steps": 4, "tokenizer": chat_tokenizer}
    found = pack(["a b c"] * 50, 512, facts_of(tiny_gpt2()), **options)
    assert {batch["input_ids"].shape[1] for batch in found} == {60}


def test_too_little_text_for_one_sample_is_said(pack, chat_tokenizer, caplog):
    (batch,) = pack(["a b", "c"], 32, tokenizer=chat_tokenizer)
    assert batch["input_ids"].shape == (1, 4)
    assert "all texts together have 4 tokens, fewer than the 32 of a sample: use more data" in caplog.text


@pytest.mark.parametrize(
    "dataset, message",
    [
        (
            [{"input_ids": [1, 2], "text": "a"}],
            "concatenate_data=True packs texts, and the dataset holds inputs",
        ),
        ([{"input_ids": torch.ones(1, 2)}], "concatenate_data=True packs texts, and the dataset holds batches: drop"),
        (lambda model: None, "concatenate_data=True does not go with a callable"),
    ],
)
def test_what_is_no_text_is_not_packed(dataset, message, chat_tokenizer):
    config = FP8Config(dataset=dataset, concatenate_data=True, tokenizer=chat_tokenizer)
    with pytest.raises(FP8CalibrationError, match=message):
        check_dataset(dataset).opened(dataset, config, LLAMA)
