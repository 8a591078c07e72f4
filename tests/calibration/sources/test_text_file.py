"""Calibration data from a text file."""

import pytest

from optimum_fp8.errors import FP8CalibrationError


@pytest.mark.core
def test_a_text_file_is_cut_into_paragraph_sized_samples(tmp_path, load, ids, tokenizer):
    (tmp_path / "short.txt").write_text("a b c\n\nb\n")
    assert [ids(batch) for batch in load(tmp_path / "short.txt", tokenizer=tokenizer)] == [[[2, 3, 4, 3]]]
    (tmp_path / "long.MD").write_text(("a " * 600 + "\n\n") * 4)
    samples = load(tmp_path / "long.MD", tokenizer=tokenizer, max_seq_length=4096)
    assert [batch["input_ids"].shape[1] for batch in samples] == [1200, 1200]


def test_an_empty_file_holds_nothing(tmp_path, load, tokenizer):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(FP8CalibrationError, match=r"the dataset='.*empty.txt' is empty: expected at least one sample"):
        load(tmp_path / "empty.txt", tokenizer=tokenizer)


def test_other_encodings_say_so(tmp_path, load, tokenizer):
    (tmp_path / "data.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FP8CalibrationError, match="data.txt' is not UTF-8 text"):
        load(tmp_path / "data.txt", tokenizer=tokenizer)
