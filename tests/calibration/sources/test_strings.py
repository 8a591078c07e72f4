"""Calibration data from a list of strings."""

import pytest


@pytest.mark.core
@pytest.mark.parametrize("make", [list, tuple])
def test_each_string_is_a_sample(make, load, ids, tokenizer):
    found = load(make(["a b c", "b", "c c c c", "a"]), tokenizer=tokenizer)
    assert [ids(batch) for batch in found] == [[[2, 3, 4]], [[3]], [[4, 4, 4, 4]], [[2]]]
