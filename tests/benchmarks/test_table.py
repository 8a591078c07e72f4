"""A row says by itself whether what was wanted was reached."""

from __future__ import annotations

import pytest

from benchmarks import table
from benchmarks.table import Row


@pytest.mark.parametrize(
    "ratio, wanted, at_most, limit, wanted_limit, met",
    [
        (3.4, 3.3, False, None, None, True),
        (3.2, 3.3, False, None, None, False),
        (1.2, 1.3, True, None, None, True),
        (1.4, 1.3, True, None, None, False),
        (3.4, 3.3, False, 0.85, 0.8, True),
        (3.4, 3.3, False, 0.75, 0.8, False),  # every wish has to come true
        (None, None, False, 0.7, 0.6, True),
        (3.4, None, False, 0.7, None, None),  # nothing was wanted
    ],
)
def test_met(ratio, wanted, at_most, limit, wanted_limit, met):
    row = Row("what", "1 s", "2 s", ratio, wanted, at_most, limit, "reading", wanted_limit)
    assert row.met is met
    assert row.cells()[-1] == {True: "ok", False: "MISSED", None: ""}[met]


def test_cells_show_the_sense_of_a_wish():
    faster = Row("linear", "1 ms", "bf16 2 ms", 2.0, 1.5, limit=0.5, limit_name="reading", wanted_limit=0.8)
    assert faster.cells() == ("linear", "1 ms", "bf16 2 ms", "2.00", "≥ 1.50", "50% reading", "≥ 80%", "MISSED")
    assert Row("memory", "1", "2", 0.5, 1.0, at_most=True).cells()[4] == "≤ 1.00"


def test_text_aligns_columns():
    lines = table.text([Row("a", "1 ms", "bf16", 2.0), Row("much longer", "1 ms", "bf16", 2.0)]).splitlines()
    assert len(lines) == 4
    assert len({line.index("ratio" if "ratio" in line else "2.00") for line in (lines[0], *lines[2:])}) == 1


def test_markdown_has_the_machine_all_rows_and_notes(tmp_path):
    rows = [Row("a | b", "1 ms", "bf16", 2.0), Row("c", "1 ms", "bf16", 2.0)]
    page = table.markdown(rows, {"processor": "x"}, "Title", ["a note"])
    table.write(tmp_path / "results" / "page.md", page)
    lines = (tmp_path / "results" / "page.md").read_text().splitlines()
    assert lines[0] == "# Title"
    assert "| processor | x |" in lines
    assert "- a note" in lines
    columns = [
        line.replace("\\|", "").count("|") for line in lines if line.startswith(("| what", "| a", "| c", "|---|---|-"))
    ]
    assert columns == [len(table.HEADER) + 1] * 4
