"""A rival that raises, or dies, is left out; what is needed is not."""

from __future__ import annotations

import sys

import pytest

from benchmarks import failures
from benchmarks.failures import Rivals

KILL = "import os, signal; os.kill(os.getpid(), signal.{})"


def broken():
    raise ImportError("no module\nnamed int8")


def test_a_rival_that_raises_is_told_of_once_and_not_asked_again():
    rivals, asked = Rivals(["int8"]), []
    assert rivals.attempt("int8", broken) is None
    assert rivals.attempt("int8", lambda: asked.append(1)) is None and not asked
    row = rivals.rows("decode")[0]
    assert (row.what, row.baseline) == ("decode, beside int8", "not run: ImportError: no module named int8")
    assert row.ratio is row.met is None


def test_others_raise_as_ever():
    rivals = Rivals(["int8"])
    assert rivals.attempt("FP8", lambda: 3) == 3
    with pytest.raises(ImportError):
        rivals.attempt("FP8", broken)
    assert rivals.rows("decode") == []


def test_reasons_are_short_lines():
    assert failures.reason(RuntimeError("a\n b")) == "a b"
    assert failures.reason(KeyError("x")) == "KeyError: 'x'"
    assert len(failures.reason(RuntimeError("x" * 9999))) < 300


@pytest.mark.parametrize(
    "script, told",
    [
        (KILL.format("SIGILL"), "the rival was killed by SIGILL (an instruction that this processor does not have)"),
        (KILL.format("SIGSEGV"), "the rival was killed by SIGSEGV"),
        ("raise ValueError('no such model')", "the rival ended with status 1: ValueError: no such model"),
    ],
)
def test_what_ends_another_process_is_an_error_in_this_one(script, told):
    with pytest.raises(RuntimeError) as caught:
        failures.try_apart("the rival", [sys.executable, "-c", script])
    assert str(caught.value) == told


def test_what_runs_apart_may_also_work():
    failures.try_apart("the rival", [sys.executable, "-c", "pass"])
