"""A page is on disk after every part, whatever becomes of the next."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import machine
from benchmarks.page import Page
from benchmarks.table import Row


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "page.md"


def measured(name):
    return lambda: ([Row(f"row of {name}", "1 ms", "bf16 2 ms", 2.0)], [f"note of {name}"])


def broken():
    raise OSError("disk full")


def test_all_parts_are_on_the_page(path):
    page = Page(path, "Title", {"processor": "x"})
    page.run({"linear": measured("linear"), "casts": measured("casts")}, after=lambda: {"load": "1"})
    text = path.read_text()
    assert "row of linear" in text and "row of casts" in text and "- note of casts" in text
    assert "| parts | linear 0 s, casts 0 s |" in text and "| load | 1 |" in text and not page.failed


def test_a_part_that_raises_is_a_row_and_the_others_go_on(path, capsys):
    page = Page(path, "Title", {})
    page.run({"linear": measured("linear"), "casts": broken, "conv": measured("conv")})
    text = path.read_text()
    assert "row of linear" in text and "row of conv" in text
    assert "| part casts |  | not run: OSError: disk full |" in text
    assert page.failed == ["casts"] and "disk full" in capsys.readouterr().err


def test_what_was_measured_before_an_interrupt_is_kept(path):
    def interrupted():
        raise KeyboardInterrupt

    page = Page(path, "Title", {})
    with pytest.raises(KeyboardInterrupt):
        page.run({"linear": measured("linear"), "casts": interrupted, "conv": measured("conv")})
    text = path.read_text()
    assert "row of linear" in text and "row of conv" not in text
    assert "| parts | linear 0 s; not finished: casts, conv |" in text


@pytest.fixture
def run_program(path, monkeypatch):
    def run(**parts) -> int:
        monkeypatch.setattr(program, "__file__", str(path.parents[1] / "__main__.py"))
        monkeypatch.setattr(program, "PARTS", {name: lambda options, run=run: run() for name, run in parts.items()})
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", *parts, "--name", "page"])
        return program.main()

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("casts, status", [(measured("casts"), 0), (broken, 1)])
def test_program_ends_with_status_1_where_a_part_of_ours_raised(casts, status, path, run_program):
    assert run_program(casts=casts, linear=measured("x")) == status
    assert "row of x" in path.read_text()


def test_a_part_that_raises_leaves_the_threads_of_the_next(run_program):
    def on_one_thread():
        torch.set_num_threads(1)
        raise OSError

    seen = []
    run_program(casts=on_one_thread, linear=lambda: (seen.append(torch.get_num_threads()), measured("x")())[1])
    assert seen == [machine.THREADS]
