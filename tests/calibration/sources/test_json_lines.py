"""Calibration data from a JSON-lines file."""

import json

import pytest
from tiny_models import tiny_llama

from optimum_fp8.calibration import facts_of
from optimum_fp8.errors import FP8CalibrationError

TEXTS = ["a b c", "b", "c c c c", "a"]


@pytest.mark.core
@pytest.mark.parametrize("column", ["text", "body"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_the_text_of_each_line(column, suffix, tmp_path, load, ids, tokenizer):
    path = tmp_path / f"texts{suffix}"
    path.write_text("\n\n".join(json.dumps({column: text, "label": 1}) for text in TEXTS) + "\n")
    found = load(path, tokenizer=tokenizer, text_column=column)
    assert [ids(batch) for batch in found] == [[[2, 3, 4]], [[3]], [[4, 4, 4, 4]], [[2]]]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text"', "data.json, line 2 is not JSON"),
        ('{"body": "a"}', r"line 1 has no text under 'text': set text_column to one of \['body'\]"),
        ('["a"]', "line 1 has no text under 'text': it is a list, and one object a line is expected"),
        ('{"text": 3}', "line 1 has no text under 'text': the value is 3: expected a string"),
        ('{"text": "a"}\n{"text": null}', "line 2 has no text under 'text': the value is null: correct or remove"),
        ('{"body": "a", "n": 3}', r"line 1 has no text under 'text': set text_column to one of \['body'\]"),
        ('{"n": 3}', r"line 1 has no text under 'text': it has no text at all, only \['n'\]"),
        ('[\n  {"text": "a"}\n]', "data.json, line 1 is not JSON: .*; expected one object a line"),
        (b'{"text": "\xff"}', "data.json' is not UTF-8 text"),
    ],
)
def test_bad_lines_say_where(content, message, tmp_path, load, tokenizer):
    (tmp_path / "data.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FP8CalibrationError, match=message):
        load(tmp_path / "data.json", tokenizer=tokenizer)


@pytest.mark.core
def test_lines_of_model_inputs(tmp_path, load, caplog):
    lines = [{"input_ids": [3, 4], "labels": [4, 5], "idx": 7}, {"input_ids": [5, 6], "labels": [6, 7], "idx": 8}]
    path = tmp_path / "inputs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    (batch,) = load(path, facts_of(tiny_llama()), batch_size=2)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[3, 4], [5, 6]],
        "labels": [[4, 5], [6, 7]],
    }
    assert "left out: idx" in caplog.text
    path.write_text('{"input_ids": [3, 4]}\n[3, 4]')
    with pytest.raises(FP8CalibrationError, match=r"inputs.jsonl, line 2 is \[3, 4\]: expected an object"):
        load(path, facts_of(tiny_llama()))


def test_columns_beside_a_text_are_said(tmp_path, load, tokenizer, caplog):
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "labels": [1], "idx": 7}')
    load(tmp_path / "texts.jsonl", facts_of(tiny_llama()), tokenizer=tokenizer)
    assert "columns of the dataset that are not the text are left out: idx, labels" in caplog.text


def test_inputs_of_later_lines_are_said(tmp_path, load, caplog):
    (tmp_path / "inputs.jsonl").write_text('{"input_ids": [3, 4]}\n{"input_ids": [3, 4], "attention_mask": [1, 1]}')
    load(tmp_path / "inputs.jsonl", facts_of(tiny_llama()))
    assert "columns of the dataset that the first row does not have are left out: attention_mask" in caplog.text
