"""Calibration data from a JSON-lines file."""

import gzip
import json

import pytest
from tiny_models import tiny_llama

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import check_dataset, facts_of
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
        ('{"body": "a"}', r"line 1 has the columns \['body'\]: .* 'text': set text_column \(valid: body\)"),
        ('{"texts": "a", "n": 3}', r"line 1 has .* set text_column \(did you mean 'texts'\? valid: texts\)"),
        (
            '{"n": 3}',
            r"line 1 has the columns \['n'\]: expected text in 'text', or inputs of the model",
        ),
        ('["a"]\n["b"]', r"line 1 is \['a'\]: expected an object such as \{'text': …\}, or a string"),
        ("[3]", r"item 0 is 3: expected an object"),
        ('{"text": 3}', "line 1, column 'text' is of type int, not text or a conversation"),
        (
            '{"text": "a"}\n{"text": null}',
            "line 2, column 'text' is None, not text: clean the column, or set",
        ),
        ('[\n  {"text": "a"}\n', "data.json' is not JSON: .*; expected a list of objects"),
        ('{\n  "text": "a"\n}', "line 1 is not JSON: .*; expected one object a line, or a list in a .json file"),
        (b'{"text": "\xff"}', "data.json' is not UTF-8 text"),
    ],
)
def test_bad_lines_say_where(content, message, tmp_path, load, tokenizer):
    (tmp_path / "data.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FP8CalibrationError, match=message):
        load(tmp_path / "data.json", facts_of(tiny_llama()), tokenizer=tokenizer)


@pytest.mark.core
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("items", [TEXTS, [{"text": text} for text in TEXTS]], ids=["strings", "objects"])
def test_a_list_of_objects_or_strings(items, indent, tmp_path, load, ids, tokenizer):
    (tmp_path / "texts.json").write_text(json.dumps(items, indent=indent))
    found = load(tmp_path / "texts.json", tokenizer=tokenizer)
    assert [ids(batch) for batch in found] == [[[2, 3, 4]], [[3]], [[4, 4, 4, 4]], [[2]]]


def test_compressed_lines_of_strings(tmp_path, load, ids, tokenizer):
    path = tmp_path / "texts.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8-sig") as file:
        file.write('"a b"\n"c"\n')
    assert [ids(batch) for batch in load(path, tokenizer=tokenizer)] == [[[2, 3]], [[4]]]
    whole = path.read_bytes()
    for damaged in (b"not compressed", whole[:-12], whole[:12] + b"\xff" * 20):
        path.write_bytes(damaged)
        with pytest.raises(FP8CalibrationError, match="texts.jsonl.gz' cannot be read"):
            load(path, tokenizer=tokenizer)


def test_no_more_lines_are_kept_than_needed(tmp_path, ids, tokenizer):
    """The lines of a large file are read one by one."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n' * 10 + "no JSON")
    config = FP8Config(dataset=path, tokenizer=tokenizer, num_calibration_samples=9)
    batches = check_dataset(config.dataset).opened(config.dataset, config, facts_of(tiny_llama()))
    assert [ids(batch) for batch in batches] == [[[2]]] * 9


@pytest.mark.core
def test_shuffling_draws_from_the_whole_file(tmp_path, load, tokenizer):
    words = tokenizer.convert_ids_to_tokens([2, 3, 4])
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(words[number // 20]) for number in range(60)))

    def found(seed):
        keys = {"shuffle_calibration_samples": True, "calibration_seed": seed, "num_calibration_samples": 12}
        return [batch["input_ids"].item() for batch in load(path, tokenizer=tokenizer, **keys)]

    assert set(found(0)) == {2, 3, 4} and found(0) == found(0) != found(1)


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
    with pytest.raises(FP8CalibrationError, match=r"inputs.jsonl, line 2 is \[3, 4\]: expected an object such as"):
        load(path, facts_of(tiny_llama()))


def test_columns_beside_a_text_are_said(tmp_path, load, tokenizer, caplog):
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "labels": [1], "idx": 7}')
    load(tmp_path / "texts.jsonl", facts_of(tiny_llama()), tokenizer=tokenizer)
    assert "columns of the dataset that are not the text are left out: idx, labels" in caplog.text


def test_inputs_of_later_lines_are_said(tmp_path, load, caplog):
    (tmp_path / "inputs.jsonl").write_text('{"input_ids": [3, 4]}\n{"input_ids": [3, 4], "attention_mask": [1, 1]}')
    load(tmp_path / "inputs.jsonl", facts_of(tiny_llama()))
    assert "columns of the dataset that the first row does not have are left out: attention_mask" in caplog.text
