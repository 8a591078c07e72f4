"""The documentation is true: its snippets run, its links lead somewhere, its tables agree with the code."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grids import slow_but

from optimum_fp8 import FP8Config
from optimum_fp8.scales import SCALE_METHODS, activation_scale

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page's fenced blocks, behind as many empty lines as stand before them: errors name the line."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == language]
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def table(page: Path, first_cell: str) -> list[list[str]]:
    """The rows of the table whose header begins with `first_cell`, without header and rule."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {first_cell} |"):
            next(lines)
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def beside_the_examples(tmp_path, monkeypatch):
    """A folder of its own in which the examples are where the snippets expect them."""
    for folder in ("examples", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for each other
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def registries():
    """What a page registers is gone afterwards."""
    from optimum_fp8 import checkpoint, measure, rounding, scales
    from optimum_fp8.calibration import SOURCES
    from optimum_fp8.checkpoint.foreign import READERS
    from optimum_fp8.modules import handler, own_forward
    from optimum_fp8.ops import dispatch

    tables = (
        *(checkpoint.FORMATS, measure.OBSERVERS, scales.VALUES, scales.SCALE_METHODS, rounding.ROUNDINGS),
        *(handler._handlers, SOURCES, READERS, own_forward.EQUIVALENTS, *dispatch._kernels.values()),
    )
    before = [table.copy() for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries) if isinstance(table, dict) else table.extend(entries)


SNIPPETS = [page for page in PAGES if blocks(page, "python")]
LONG = {"trainer.md", "verify.md"}  # trains, and starts processes that import everything


@pytest.mark.parametrize(
    "page", slow_but(SNIPPETS, *(page for page in SNIPPETS if page.name not in LONG)), ids=lambda page: page.name
)
def test_python_snippets_run(page, beside_the_examples, registries):
    namespace: dict[str, object] = {"__name__": page.stem}
    for code in blocks(page, "python"):
        with contextlib.redirect_stdout(None):
            exec(compile(code, page, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_run(page, beside_the_examples):
    for command in commands(page):
        assert command.startswith("optimum-cli "), command
        run = subprocess.run(command, shell=True, capture_output=True, text=True)
        action = command.split()[2]  # most say what they have written
        expected = {"quantize": "modules in FP8", "selftest": "OK on"}.get(action, "/")
        assert run.returncode == 0 and expected in run.stdout, f"{command}\n{run.stderr}"


def test_commands_have_flags_that_exist():
    from argparse import ArgumentParser

    from optimum.commands.register.register_fp8 import FP8Command

    actions = {command.name: command.subcommand_class for command in FP8Command.SUBCOMMANDS}
    for page in PAGES:
        for command in commands(page):
            program, group, action, *arguments = command.split()
            assert (program, group) == ("optimum-cli", "fp8") and action in actions
            parser = ArgumentParser()
            actions[action].parse_args(parser)
            parser.parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES[1:]]
    assert [page for page in pages if f"]({page}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_outside_tables_and_code(page):
    prose = BLOCK.sub("", page.read_text(encoding="utf-8")).splitlines()
    assert [line for line in prose if len(line) > 120 and not line.startswith("|")] == []


def test_the_readme_lists_every_file_and_folder_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    entries = [path for path in (ROOT / "optimum_fp8").iterdir() if path.name[0] not in "_."]
    names = [path.name if path.suffix else f"{path.name}/" for path in entries if path.suffix in ("", ".py")]
    assert [name for name in names if name not in text] == []


def test_every_overlap_has_one_row():
    rows = [row[0] for row in table(ROOT / "docs" / "configuration.md", "keys")]
    assert len(rows) == len(set(rows))
    keys = {name for row in rows for name in row.split(" / ") if "_" in name}
    assert keys <= {*FP8Config.DEFAULTS, "scale_params"}


def test_the_scale_table_has_every_method():
    rows = table(ROOT / "docs" / "scale-methods.md", "method")
    assert [row[0].strip("`") for row in rows] == list(SCALE_METHODS)


def test_the_example_scales_are_what_the_code_gives():
    rows = table(ROOT / "docs" / "scale-methods.md", "maxabs")
    assert len(rows) >= 12
    for maxabs, method, *expected in rows:
        for target, value in zip(("gaudi2", "gaudi3", "cuda", "cpu"), expected, strict=True):
            found = activation_scale(float(maxabs), method=method.strip("`"), target=target).item()
            assert found == float(value), (maxabs, method, target)
