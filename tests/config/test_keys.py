"""The table of keys: what is made from it, and that no key is listed anywhere else."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import optimum_fp8
from optimum_fp8 import FP8Config
from optimum_fp8.config.key_texts import markdown_table
from optimum_fp8.config.keys import KEYS, ConfigKeys
from optimum_fp8.formats import FP8_DTYPES, HP_DTYPES, TARGETS

PACKAGE = Path(optimum_fp8.__file__).parent
ROOT = PACKAGE.parent
TABLE = PACKAGE / "config" / "keys.py"
READERS = [*(path for path in PACKAGE.rglob("*.py") if path != TABLE), *(ROOT / "optimum").rglob("*.py")]
KEYS_OF_A_LIST = 6


# --- one place ----------------------------------------------------------------------------------------------------


def words(node: ast.AST) -> set[str]:
    """The words that a collection or a string lists; for a class, the names it annotates or assigns."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return set(node.value.split()) if re.fullmatch(r"[\w\s,-]+", node.value) else set()
    if isinstance(node, ast.Dict):
        return {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return {item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)}
    if isinstance(node, ast.ClassDef):
        return {part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and hasattr(part.target, "id")}
    return set()


def second_places(text: str) -> list[str]:
    """Where `text` lists many keys, declares a key's flag, or annotates a key in a class that is FP8Config."""
    found = []
    for node in ast.walk(ast.parse(text)):
        listed = words(node) & set(KEYS)
        own = isinstance(node, ast.ClassDef) and node.name in ("FP8Config", "ConfigKeys") and listed
        if own or len(listed) >= KEYS_OF_A_LIST:
            found.append(f"line {node.lineno} lists {', '.join(sorted(listed))}")
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            flags = {key.flag for key in KEYS.values()} & {getattr(arg, "value", None) for arg in node.args}
            found += [f"line {node.lineno} declares {flag}" for flag in sorted(flags)]
    return found


def test_no_key_is_listed_a_second_time():
    found = {str(path.relative_to(ROOT)): second_places(path.read_text(encoding="utf-8")) for path in READERS}
    assert {path: places for path, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "text, count",
    [
        ("KEYS = 'dataset scale_method fp8_config target batch_size text_column'", 1),
        ("DEFAULTS = {'fp8_config': 1, 'hp_dtype': 2, 'mode': 3, 'target': 4, 'dataset': 5, 'attention': 6}", 1),
        ("CHECKS = ['fp8_config', 'hp_dtype', 'mode', 'target', 'dataset', 'attention']", 1),
        ("class FP8Config:\n    use_qdq: bool", 1),
        ("parser.add_argument('--scale-method', help='x')", 1),
        ("parser.add_argument('--model')\nscheme = {'input_backoff': 1, 'weight_backoff': 2}", 0),
        ("'''A sentence about the mode, the target and the dataset.'''", 0),
    ],
)
def test_a_second_place_is_found(text, count):
    assert len(second_places(text)) == count


def test_the_table_needs_neither_torch_nor_transformers():
    code = "import sys, optimum_fp8.config.keys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


# --- what is made from it -----------------------------------------------------------------------------------------


def test_the_config_has_every_key():
    assert list(FP8Config.DEFAULTS) == list(KEYS) == list(inspect.signature(FP8Config).parameters)
    assert {name: p.default for name, p in inspect.signature(FP8Config).parameters.items()} == FP8Config.DEFAULTS
    assert FP8Config.LIVE == ("dataset", "tokenizer", "processor")
    assert set(FP8Config().to_dict()) == {*KEYS, "quant_method"}
    assert [line for name in KEYS for line in [f"    {name}: "] if line not in (FP8Config.__doc__ or "")] == []


def test_every_key_has_a_type_that_checkers_see():
    assert list(get_type_hints(ConfigKeys)) == list(KEYS)
    assert [name for name in KEYS if inspect.getattr_static(FP8Config, name) is not KEYS[name]] == []


def test_every_key_is_whose_it_is_and_has_a_text():
    for name, key in KEYS.items():
        assert key.name == name and key.origin in ("INC", "HF", "ours")
        assert key.text and not key.text.endswith("."), name
        assert key.normalize(key.normalize(key.default)) == key.normalize(key.default)


def test_modules_differ_in_these_keys():
    assert [name for name, key in KEYS.items() if key.of_module] == [
        "fp8_config",
        "hp_dtype",
        "scale_method",
        "input_backoff",
        "weight_backoff",
        "scale_format",
        "dynamic_quantization",
        "use_qdq",
        "row_parallel_linear_allreduce_quantization",
        "activation_scheme",
        "quantize_embeddings",
        "attention",
        "kv_cache",
        "kv_cache_skip",
        "attention_granularity",
        "attention_dataflow",
        "softmax_backoff",
    ]


def test_choices_are_those_of_the_number_formats():
    assert KEYS["target"].values.text == ", ".join(f'"{name}"' for name in ("auto", *TARGETS))
    assert KEYS["fp8_config"].values.text == ", ".join(f'"{name}"' for name in FP8_DTYPES)
    for name, dtype in HP_DTYPES.items():
        assert KEYS["hp_dtype"].normalize(dtype) == name and f'"{name}"' in KEYS["hp_dtype"].values.text


def test_the_documentation_has_the_table_as_it_is():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert markdown_table() in page.split("\n\n"), f"docs/configuration.md must contain:\n\n{markdown_table()}"
