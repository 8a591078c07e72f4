"""The report: a table, notes below it, one line that sums up, and plain values."""

from __future__ import annotations

import json
import math

import pytest

from optimum_fp8.self_test import Row, SelfTestReport


def row(result="pass", kernel="cpu_avx2", why="", difference=0.0, **changes):
    values = {
        "operator": "linear",
        "fp8_config": "E4M3",
        "case": "bf16, decode",
        "bound": 1.0,
        "unit": "ulps",
        "microseconds": None if difference is None else 12.3,
    }
    return Row(**values | changes, result=result, kernel=kernel, why=why, difference=difference)


def report(*rows, missing=None, backend=None):
    return SelfTestReport("cpu", "cpu", backend, missing, {"torch": "2.13"}, list(rows))


@pytest.mark.parametrize(
    ("found", "ok", "summary"),
    [
        (report(row(), row()), True, "OK on cpu: 2 passed, 0 failed; ran on: cpu_avx2 2"),
        (
            report(row(), row("refused", "", "no", None)),
            True,
            "OK on cpu: 1 passed, 0 failed, 1 refused; ran on: cpu_avx2 1",
        ),
        (report(row(), row("FAIL")), False, "NOT OK on cpu: 1 passed, 1 failed; ran on: cpu_avx2 2"),
        (
            report(row("refused", "", "no", None)),
            False,
            "NOT OK on cpu: 0 passed, 0 failed, 1 refused; ran on: nothing",
        ),
        (report(), False, "NOT OK on cpu: 0 passed, 0 failed; ran on: nothing"),
        (
            report(row(kernel="reference"), missing="not built"),
            False,
            "NOT OK on cpu: 1 passed, 0 failed; ran on: reference 1; its kernels are missing: not built",
        ),
    ],
)
def test_one_line_sums_up(found, ok, summary):
    assert found.ok is ok and found.summary == summary and str(found).endswith(summary)


def test_the_table_has_a_line_a_case_and_its_reasons_below():
    rows = [
        row(),
        row("pass", "reference", "hpu: dataflow 'qdq'"),
        row("FAIL", "", "RuntimeError: no", None),
        row("pass", "reference", "hpu: dataflow 'qdq'"),
        row("FAIL", difference=math.inf),
    ]
    lines = str(report(*rows)).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("operator"))
    table = [line.split("  ") for line in lines[start + 2 : start + 7]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert cells[0] == ["linear", "E4M3", "bf16, decode", "cpu_avx2", "0 ulps", "1", "12", "pass"]
    assert [line[3] for line in cells] == ["cpu_avx2", "reference [1]", "nothing [2]", "reference [1]", "cpu_avx2"]
    assert cells[2][4:] == ["-", "1", "-", "FAIL"] and cells[4][4] == "inf ulps"
    assert "[1] hpu: dataflow 'qdq'" in lines and "[2] RuntimeError: no" in lines
    assert {"torch    2.13", "device   cpu", "target   cpu"} <= set(lines)


def test_plain_values_are_json():
    found = report(row(), row("FAIL", difference=math.inf), row("FAIL", "", "no", None))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["ok"] is False and read["summary"] == found.summary and read["versions"] == {"torch": "2.13"}
    assert [each["difference"] for each in read["rows"]] == [0.0, "inf", None]
    assert read["rows"][0].keys() == vars(row()).keys()
