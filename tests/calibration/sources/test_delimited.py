"""Calibration data from tables of text."""

import gzip

import pytest
from tiny_models import tiny_bert, tiny_llama

from optimum_fp8.calibration import facts_of
from optimum_fp8.errors import FP8CalibrationError

LLAMA = facts_of(tiny_llama())


@pytest.mark.core
@pytest.mark.parametrize("name, delimiter", [("texts.csv", ","), ("texts.TSV", "\t"), ("texts.csv.gz", ",")])
def test_the_text_of_each_row(name, delimiter, tmp_path, load, ids, tokenizer, caplog):
    lines = ["id,text", '1,"a b', ' c"', "2,c"]
    data = "\n".join(lines).replace(",", delimiter)
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt", encoding="utf-8-sig") as file:
        file.write(data)
    found = load(tmp_path / name, LLAMA, tokenizer=tokenizer)
    assert [ids(batch) for batch in found] == [[[2, 3, 4]], [[4]]]
    assert "are not the text are left out: id" in caplog.text


def test_pairs_become_conversations(tmp_path, load, chat_tokenizer):
    (tmp_path / "pairs.csv").write_text("question,answer\na b,c\n")
    (batch,) = load(tmp_path / "pairs.csv", LLAMA, tokenizer=chat_tokenizer)
    assert chat_tokenizer.decode(batch["input_ids"][0]) == "<user> a b </s> <assistant> c </s>"


@pytest.mark.parametrize(
    "data, message",
    [
        ("id,texts\n1,a\n", r"line 2 has the columns \['id', 'texts'\]: .* set text_column \(did you mean 'texts'"),
        ("id,text\n1,a\n2\n", "line 3, column 'text' is None, not text"),
        ("id,text\n1,a,b\n", "line 2 has more values than the 2 columns: quote those with a delimiter in them"),
        ("id,text\n", "texts.csv' is empty: expected at least one sample"),
        ("", "texts.csv' is empty"),
        ("text\n" + "a" * 200_000, r"texts.csv, line \d cannot be read \(field larger.*write the data as JSON lines"),
        (b"text\n\xff\n", "texts.csv' is not UTF-8 text"),
    ],
    ids=["column", "missing", "delimiter", "no rows", "empty", "long", "encoding"],
)
def test_bad_tables_say_where(data, message, tmp_path, load, tokenizer):
    (tmp_path / "texts.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(FP8CalibrationError, match=message):
        load(tmp_path / "texts.csv", facts_of(tiny_bert()), tokenizer=tokenizer)
