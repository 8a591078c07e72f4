"""House rules that no linter knows, read from the syntax tree of every file of the package."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optimum_fp8"
MAX_FILE, MAX_FUNCTION = 400, 60

# A part of the package imports from its own layer and from those above it in this list, never from those below.
LAYERS = [
    ["errors", "formats", "rounding", "import_hook"],
    ["ops"],
    ["config", "scales", "selection", "measure", "modules", "cache", "state"],
    ["calibration", "checkpoint"],
    ["hf", "commands", "report", "quantize"],
    ["test_utils", "__init__"],
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
UNAWARE = {("scales", "modules")}

VAGUE_NAMES = {"utils.py", "helpers.py", "common.py"}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib"}
FORBIDDEN_NAMES = {"torch.load", "os.environ", "os.getenv"}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "trust_remote_code"}  # as `=False` they are harmless

Rule = Callable[[Path, str], Iterator[str]]


def imports(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Every name that a file imports, anywhere in it, with its line: `optimum_fp8.formats.E4M3`."""
    package = [PACKAGE.name, *path.parent.parts]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def part(module: str) -> str:
    """The part of the package that a top-level module belongs to: `config_values` is split off `config`."""
    return module if module in HEIGHT else module.split("_")[0]


def is_short(path: Path, text: str) -> Iterator[str]:
    if (lines := len(text.splitlines())) > MAX_FILE:
        yield f"{lines} lines in a file, at most {MAX_FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION:
                yield f"{node.lineno}: {lines} lines in {node.name}(), at most {MAX_FUNCTION}"


def has_a_telling_name(path: Path, text: str) -> Iterator[str]:
    if path.name in VAGUE_NAMES:
        yield "name the file after what it does"


def has_no_hidden_channel(path: Path, text: str) -> Iterator[str]:
    for line, name in imports(path, text):
        if name.split(".")[0] in FORBIDDEN_IMPORTS or name in FORBIDDEN_NAMES:
            yield f"{line}: imports {name}"
    for node in ast.walk(ast.parse(text)):
        name = isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_NAMES
        argument = isinstance(node, ast.keyword) and node.arg in FORBIDDEN_ARGUMENTS
        if name or (argument and ast.unparse(node.value) != "False"):
            yield f"{node.lineno}: {ast.unparse(node)}"


def imports_downwards(path: Path, text: str) -> Iterator[str]:
    here = part(path.parts[0].removesuffix(".py"))
    if here not in HEIGHT:
        yield f"{path.parts[0]} has no place in LAYERS"
        return
    for line, name in imports(path, text):
        package, _, rest = name.partition(".")
        if package != PACKAGE.name:
            continue
        there = part(rest.split(".")[0])
        there = there if there in HEIGHT else "__init__"
        if HEIGHT[there] > HEIGHT[here] or (here, there) in UNAWARE:
            yield f"{line}: {here} imports {name}"


RULES: list[Rule] = [is_short, has_a_telling_name, has_no_hidden_channel, imports_downwards]


@pytest.mark.parametrize("rule", RULES)
def test_package(rule):
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    breaches = [
        f"{PACKAGE.name}/{path.relative_to(PACKAGE)}: {breach}"
        for path in files
        for breach in rule(path.relative_to(PACKAGE), path.read_text())
    ]
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(
    "rule, path, text, count",
    [
        (is_short, "errors.py", "x = 1\n" * MAX_FILE, 0),
        (is_short, "errors.py", "x = 1\n" * (MAX_FILE + 1), 1),
        (is_short, "errors.py", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION - 1), 0),
        (is_short, "errors.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION, 1),
        (has_a_telling_name, "ops/reference.py", "", 0),
        (has_a_telling_name, "ops/utils.py", "", 1),
        (has_no_hidden_channel, "errors.py", "'pickle, torch.load(), os.environ'", 0),
        (has_no_hidden_channel, "errors.py", "import pickle\nfrom dill import load", 2),
        (has_no_hidden_channel, "errors.py", "torch.load(path)\nos.environ['A'] = '1'\nos.getenv('A')", 3),
        (has_no_hidden_channel, "errors.py", "from os import environ", 1),
        (has_no_hidden_channel, "errors.py", "np.load(path, allow_pickle=False)", 0),
        (has_no_hidden_channel, "errors.py", "np.load(path, allow_pickle=True)", 1),
        (has_no_hidden_channel, "errors.py", "f(trust_remote_code=True)", 1),
        (imports_downwards, "ops/reference.py", "from ..formats import E4M3\nfrom . import registry\nimport torch", 0),
        (imports_downwards, "ops/reference.py", "from ..config import FP8Config", 1),
        (imports_downwards, "ops/cpu/__init__.py", "def f():\n    from ...modules.linear import FP8Linear", 1),
        (imports_downwards, "modules/linear.py", "from optimum_fp8 import ops, scales\nfrom .. import formats", 0),
        (imports_downwards, "modules/linear.py", "from optimum_fp8 import FP8Config\nimport optimum_fp8.hf", 2),
        (imports_downwards, "scales/methods.py", "from ..modules import FP8Linear", 1),
        (imports_downwards, "config_values.py", "from .config import FP8Config\nfrom .hf import FP8Quantizer", 1),
        (imports_downwards, "__init__.py", "from .hf import FP8Quantizer", 0),
        (imports_downwards, "novelty.py", "", 1),
    ],
)
def test_rules_catch(rule, path, text, count):
    assert len(list(rule(Path(path), text))) == count
