"""House rules that no linter knows, read from the syntax tree of every file of the package."""

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optimum_fp8"
MAX_FILE, MAX_FUNCTION = 400, 60

# The floors of the package: a part imports from the floors below its own, never from its own or above. Each folder
# is a part, and so is each loose file.
FLOORS = [
    ["__init__"],
    ["adapters", "exporting", "rescaling", "training", "verifying"],
    ["files", "quantize"],
    ["commands", "hf"],
    ["self_test"],
    ["calibration", "checkpoint", "report"],
    ["lifecycle"],
    ["attention"],
    ["cache", "selection"],
    ["config", "modules"],
    ["measure", "scales"],
    ["ops"],
    ["rounding"],
    ["formats"],
    ["errors", "import_hook"],
]
HEIGHT = {part: height for height, floor in enumerate(reversed(FLOORS)) for part in floor}
# `test_utils` serves tests, and looks at everything; importing the package registers its plugin, and no more.
ABOVE_ALL, REGISTERS = "test_utils", ("__init__", "hf")
LOOSE = {"errors.py", "formats.py", "import_hook.py", "quantize.py", "rounding.py"}

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


def part(path: Path) -> str:
    """The part of the package that a file belongs to: its folder, or itself."""
    return path.parts[0].removesuffix(".py")


def imports_downwards(path: Path, text: str) -> Iterator[str]:
    here = part(path)
    if here == ABOVE_ALL:
        return
    if here not in HEIGHT:
        yield f"{path.parts[0]} has no floor in FLOORS"
        return
    for line, name in imports(path, text):
        package, _, rest = name.partition(".")
        if package != PACKAGE.name:
            continue
        there = rest.split(".")[0]
        there = there if there in HEIGHT else "__init__"
        if there != here and HEIGHT[there] >= HEIGHT[here] and (here, there) != REGISTERS:
            yield f"{line}: {here} imports {name}"


def is_a_known_loose_file(path: Path, text: str) -> Iterator[str]:
    if len(path.parts) == 1 and path.name not in LOOSE | {"__init__.py"}:
        yield f"a loose file beside {', '.join(sorted(LOOSE))}: put it into the folder it belongs to"


def module_graph(files: dict[Path, str]) -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports, at run time or for type checkers only.

    A folder's `__init__` counts for those who import names from it, and not for the files inside: they name each other.
    """
    names = {".".join([PACKAGE.name, *path.with_suffix("").parts]).removesuffix(".__init__"): path for path in files}
    graph: dict[str, set[str]] = {}
    for module, path in names.items():
        found = set()
        for _, name in imports(path, files[path]):
            target = name if name in names else name.rpartition(".")[0]
            if target in names and target != module and not f"{module}.".startswith(f"{target}."):
                found.add(target)
        graph[module] = found
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first also last; none: []."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := walk(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in sorted(graph))), [])


TESTS = Path(__file__).parent
# Tests of the repository rather than of a file: what is said in it, how it is packed, and the tests' own tools.
OF_THE_REPOSITORY = {
    *("test_conftest.py", "test_docs.py", "test_fresh.py", "test_packaging.py", "test_promises.py", "test_style.py"),
    "test_mutations.py",
}


def is_named_after_a_file(path: Path, modules: Iterable[str]) -> bool:
    """Whether a test file is `test_<file>.py` or `test_<file>_<aspect>.py` for one of the modules it stands beside."""
    name = path.stem.removeprefix("test_")
    return any(name == module or name.startswith(f"{module}_") for module in modules)


RULES: list[Rule] = [
    is_short,
    has_a_telling_name,
    has_no_hidden_channel,
    imports_downwards,
    is_a_known_loose_file,
]


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


def test_tests_are_named_after_the_file_they_test():
    misnamed = []
    for path in TESTS.rglob("test_*.py"):
        folder = path.parent.relative_to(TESTS)
        tested = (TESTS.parent if folder.parts[:1] in (("benchmarks",), ("examples",)) else PACKAGE) / folder
        modules = [each.stem.strip("_") for each in tested.iterdir() if each.suffix == ".py" or each.is_dir()]
        if path.name not in OF_THE_REPOSITORY and not is_named_after_a_file(path, modules):
            misnamed.append(str(path.relative_to(TESTS)))
    assert misnamed == []
    assert is_named_after_a_file(Path("test_linear_compiled.py"), ["linear"])
    assert not is_named_after_a_file(Path("test_linearity.py"), ["linear"])


def test_nothing_is_imported_in_a_circle():
    files = {path.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob("*.py")}
    graph = module_graph(files)
    assert len(graph) == len(files) and sum(map(len, graph.values())) > len(files)
    assert circle(graph) == []


@pytest.mark.parametrize(
    "files, found",
    [
        ({"a.py": "from .b import x", "b.py": "from .a import y"}, ["optimum_fp8.a", "optimum_fp8.b", "optimum_fp8.a"]),
        ({"a.py": "from .b import x", "b.py": "import torch"}, []),
        (
            {"a.py": "if TYPE_CHECKING:\n    from .b import x", "b.py": "def f():\n    from .a import y"},
            ["optimum_fp8.a", "optimum_fp8.b", "optimum_fp8.a"],
        ),
        ({"f/__init__.py": "from .g import x", "f/g.py": "from . import h", "f/h.py": ""}, []),
        (
            {"f/g.py": "from .h import x", "f/h.py": "from ..i import y", "i.py": "import optimum_fp8.f.g"},
            ["optimum_fp8.f.g", "optimum_fp8.f.h", "optimum_fp8.i", "optimum_fp8.f.g"],
        ),
    ],
)
def test_circles_are_found(files, found):
    assert circle(module_graph({Path(path): text for path, text in files.items()})) == found


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
        (imports_downwards, "config/values.py", "from .config import FP8Config\nfrom ..hf import FP8Quantizer", 1),
        (imports_downwards, "config/config.py", "from ..modules import FP8Linear", 1),
        (imports_downwards, "modules/linear.py", "from ..measure import Observers\nfrom ..config import FP8Config", 1),
        (imports_downwards, "modules/linear.py", "if TYPE_CHECKING:\n    from ..selection import Decision", 1),
        (imports_downwards, "formats.py", "from .errors import FP8Error\nfrom .rounding import exp2", 1),
        (imports_downwards, "test_utils/gaudi.py", "from ..quantize import convert", 0),
        (is_a_known_loose_file, "errors.py", "", 0),
        (is_a_known_loose_file, "selection_attention.py", "", 1),
        (is_a_known_loose_file, "ops/anything.py", "", 0),
        (imports_downwards, "__init__.py", "from .hf import FP8Quantizer", 0),
        (imports_downwards, "novelty.py", "", 1),
    ],
)
def test_rules_catch(rule, path, text, count):
    assert len(list(rule(Path(path), text))) == count
