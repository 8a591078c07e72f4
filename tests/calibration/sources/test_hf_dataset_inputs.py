"""Rows of model inputs: every column that the model's forward takes arrives, and what does not is said."""

from __future__ import annotations

import logging

import datasets
import pytest
import torch
import transformers as hf
from attention_models import FAMILIES
from PIL import Image
from tiny_models import tiny_bert, tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration import facts_of
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of


def whisper():
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**sizes, **layers, **tokens, num_mel_bins=8, max_source_positions=10)
    return hf.WhisperForConditionalGeneration(config).eval()


IDS, MASK = [[3, 4, 5, 6], [7, 8, 9, 10]], [[1, 1, 1, 1], [0, 1, 1, 1]]
ROWS = {
    "t5, labels": (FAMILIES["t5"].make, {"input_ids": IDS, "attention_mask": MASK, "labels": [[5, 6], [7, 2]]}),
    "t5, decoder": (FAMILIES["t5"].make, {"input_ids": IDS, "decoder_input_ids": [[5, 6], [7, 2]]}),
    "llama, positions": (tiny_llama, {"input_ids": IDS, "position_ids": [[4, 5, 6, 7], [0, 1, 2, 3]]}),
    "bert, types": (tiny_bert, {"input_ids": IDS, "token_type_ids": [[0, 0, 1, 1]] * 2, "labels": [0, 1]}),
    "bert, embeddings": (tiny_bert, {"inputs_embeds": torch.rand(2, 3, 32).tolist()}),
    "whisper": (whisper, {"input_features": torch.rand(2, 8, 20).tolist(), "labels": [[5, 6], [7, 2]]}),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 3)), {"input": torch.rand(2, 3).tolist()}),
}


def measured(model, dataset, **keys):
    measurements = state_of(calibrate(prepare(model, FP8Config(dataset=dataset, batch_size=2, **keys)))).measurements
    return {key: observer.statistics() for key, observer in measurements.tensors.items()}


@pytest.mark.core
@pytest.mark.parametrize("name", ROWS)
def test_ranges_are_those_of_the_call_with_all_inputs(name):
    make, columns = ROWS[name]
    torch.manual_seed(0)
    expected = measured(make(), [{key: torch.tensor(value) for key, value in columns.items()}])
    torch.manual_seed(0)
    rows = datasets.Dataset.from_dict({**columns, "idx": [0, 1], "note": ["x", "y"]})
    found = measured(make(), rows)
    assert found.keys() == expected.keys()
    for key, statistics in expected.items():
        assert all(torch.equal(found[key][kind], value) for kind, value in statistics.items()), key


@pytest.mark.core
def test_what_is_left_out_is_said(load, caplog):
    rows = datasets.Dataset.from_dict({"input_ids": IDS, "labels": IDS, "label": [0, 1], "idx": [0, 1]})
    (batch,) = load(rows, facts_of(tiny_llama()), batch_size=2)
    assert set(batch) == {"input_ids", "labels"}
    assert "columns of the dataset that are no inputs of the model are left out: idx, label" in caplog.text


def test_nothing_is_said_where_nothing_is_left_out(load, tokenizer, caplog):
    load(datasets.Dataset.from_dict({"input_ids": IDS}), facts_of(tiny_llama()))
    load(datasets.Dataset.from_dict({"text": ["a"]}), facts_of(tiny_llama()), tokenizer=tokenizer)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_columns_beside_a_text_are_said(load, tokenizer, caplog):
    rows = datasets.Dataset.from_dict({"text": ["a"], "labels": [1], "idx": [3]})
    assert [set(batch) >= {"input_ids"} for batch in load(rows, facts_of(tiny_bert()), tokenizer=tokenizer)] == [True]
    assert "columns of the dataset that are not the text are left out: idx, labels" in caplog.text


def test_rows_that_are_tokenized_win_over_their_text(load, ids, caplog):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "input_ids": IDS})
    assert [ids(batch) for batch in load(rows, facts_of(tiny_llama()))] == [[row] for row in IDS]
    assert "left out: text" in caplog.text


def test_captions_of_images_for_a_model_that_sees_only(load):
    class Processor:
        def __call__(self, images, return_tensors):
            return {"pixel_values": torch.ones(len(images), 3, 8, 8)}

    vit = hf.ViTModel(hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    rows = {"text": ["a cat"], "image": [Image.new("RGB", (8, 8))]}
    (batch,) = load(datasets.Dataset.from_dict(rows), facts_of(vit), processor=Processor())
    assert set(batch) == {"pixel_values"}


def test_a_wrapper_that_takes_anything_is_given_all_numbers(load):
    class Wrapper(nn.Module):
        def forward(self, **inputs):
            return inputs

    rows = datasets.Dataset.from_dict({"input_ids": IDS, "own": [1.5, 2.5], "name": ["x", "y"]})
    (batch,) = load(rows, facts_of(Wrapper()), batch_size=2)
    assert set(batch) == {"input_ids", "own"} and batch["own"].tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    "column, message",
    [
        ([["x"], ["y"]], r"column 'labels' is an input of the model and cannot be made a tensor \("),
        ([[1], None], r"column 'labels' is an input of the model and cannot be made a tensor \("),
        ([[1], [1, 2]], r"rows of different lengths \('labels'\)"),
    ],
)
def test_columns_that_are_no_tensors(column, message, load):
    rows = datasets.Dataset.from_dict({"input_ids": IDS, "labels": column})
    with pytest.raises(FP8CalibrationError, match=message):
        load(rows, facts_of(tiny_llama()), batch_size=2)
