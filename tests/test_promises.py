"""Each promise of docs/promises.md is held by tests, and the tests it names are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "promises.md"


def rows(text: str) -> list[tuple[str, list[str]]]:
    """The promises of a page with the tests that each row names, separated by commas or line breaks."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in lines]
    body = [row for row in cells if row[0].strip(":- ") and row[0] != "promise"]
    return [
        (promise, [test.strip(" `") for test in re.split(r"<br */?>|,", tests) if test.strip(" `")])
        for promise, tests in body
    ]


@cache
def named_in(path: Path) -> frozenset[str]:
    """The tests of a file as `pytest` calls them, without their parameters: "test_x", "TestY::test_z"."""
    return frozenset(_tests_below(ast.parse(path.read_text(encoding="utf-8"))))


def _tests_below(node: ast.Module | ast.ClassDef, prefix: str = "") -> list[str]:
    found: list[str] = []
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and child.name.startswith("test"):
            found.append(f"{prefix}{child.name}")
        elif isinstance(child, ast.ClassDef) and child.name.startswith("Test"):
            found += _tests_below(child, f"{prefix}{child.name}::")
    return found


def why_not(test: str, root: Path = ROOT) -> str | None:
    """What is wrong with `tests/…py::test_name`, whose parameters do not matter; None where it is there."""
    match = re.fullmatch(r"(tests/[\w/]+\.py)::([\w:]+)(\[.*\])?", test)
    if match is None:
        return f"{test!r} is no tests/….py::test_name"
    path = root / match[1]
    if not path.is_file():
        return f"{match[1]} does not exist"
    return None if match[2] in named_in(path) else f"{match[1]} has no {match[2]}"


PROMISES = rows(PAGE.read_text(encoding="utf-8"))


@pytest.mark.core
def test_every_promise_names_a_test():
    assert PROMISES, f"{PAGE} has no table of promises"
    assert [promise for promise, tests in PROMISES if not tests] == []


@pytest.mark.core
def test_every_test_that_is_named_exists():
    wrong = [(promise, reason) for promise, tests in PROMISES for test in tests if (reason := why_not(test))]
    assert wrong == []


def test_tests_named_on_the_page_on_accelerate_exist():
    text = (ROOT / "docs" / "accelerate.md").read_text(encoding="utf-8")
    named = re.findall(r"tests/[\w/.:]+", text)
    assert len(named) > 10 and [reason for test in named if (reason := why_not(test))] == []


def test_no_promise_stands_twice():
    promises = [promise for promise, _ in PROMISES]
    assert len(promises) == len(set(promises))


def test_every_row_has_two_cells():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [line for line in lines if len(re.split(r"(?<!\\)\|", line.strip())) != 4] == []


# --- the check itself ---------------------------------------------------------------------------------------------


def test_rows_are_read_however_their_tests_are_separated():
    text = (
        "| promise | tests |\n|:--|---|\n| a \\| b | `tests/x.py::test_1`, tests/y.py::TestY::test_2 |\n"
        "| c | tests/x.py::test_3[p]<br>tests/x.py::test_4 |\n| d | |\n"
    )
    assert rows(text) == [
        ("a \\| b", ["tests/x.py::test_1", "tests/y.py::TestY::test_2"]),
        ("c", ["tests/x.py::test_3[p]", "tests/x.py::test_4"]),
        ("d", []),
    ]


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("tests/a/test_x.py::test_plain", None),
        ("tests/a/test_x.py::test_with_parameters", None),
        ("tests/a/test_x.py::test_with_parameters[1-a b]", None),
        ("tests/a/test_x.py::TestGroup::test_inside", None),
        ("tests/a/test_x.py::TestGroup::TestInner::test_deep", None),
        ("tests/a/test_x.py::test_awaited", None),
        ("tests/a/test_x.py::test_inside", "has no test_inside"),
        ("tests/a/test_x.py::helper", "has no helper"),
        ("tests/a/test_x.py::test_commented", "has no test_commented"),
        ("tests/a/test_y.py::test_plain", "does not exist"),
        ("tests/a/test_x.py", "is no tests/"),
        ("optimum_fp8/x.py::test_plain", "is no tests/"),
    ],
)
def test_a_test_is_found_by_name(tmp_path, test, reason):
    folder = tmp_path / "tests" / "a"
    folder.mkdir(parents=True)
    (folder / "test_x.py").write_text(
        "import pytest\n\ndef test_plain(): ...\n\ndef helper(): ...\n\n# def test_commented(): ...\n\n"
        "@pytest.mark.parametrize('x', [1])\ndef test_with_parameters(x): ...\n\nasync def test_awaited(): ...\n\n"
        "class TestGroup:\n    def test_inside(self): ...\n\n    class TestInner:\n        def test_deep(self): ...\n"
    )
    found = why_not(test, tmp_path)
    assert found is None if reason is None else reason in found
