"""The table of what reads what in docs/other-engines.md: each cell is a case of a test, and says what that does."""

from __future__ import annotations

import pytest
from exporting import test_engine_checkpoint_modelopt as by_modelopt
from exporting import test_engine_checkpoint_models as of_models
from exporting import test_engine_checkpoint_readers as by_readers
from exporting import test_engine_checkpoint_vllm as by_vllm
from exporting import test_inc_folder as by_inc
from test_docs import ROOT, table
from test_promises import why_not

MODELOPT = "modelopt"
PAGE = ROOT / "docs" / "other-engines.md"
HERE = "tests/exporting/test_"
# What a test does with its cases: "run" compares what a reader computes, "loads" has it take all weights, "contract"
# compares names, dtypes and shapes.
TESTS = {
    "readers": ("run", "engine_checkpoint_readers.py::test_they_compute_what_we_do", by_readers.CASES),
    "fp8": ("run", "engine_checkpoint_models.py::test_transformers_computes_what_we_do", of_models.MODELS),
    "vllm": ("run", "engine_checkpoint_vllm.py::test_vllm_computes_what_we_do_and_loads_the_rest", by_vllm.RUN),
    "in vllm": ("loads", "engine_checkpoint_vllm.py::test_vllm_computes_what_we_do_and_loads_the_rest", by_vllm.LOADED),
    "inc": ("run", "inc_folder.py::test_inc_computes_what_we_do", by_inc.COMPUTED),
    "inc's operations": ("contract", "inc_folder.py::test_attention_goes_by_the_names_of_optimum_habana", None),
    "inc's names": (
        "contract",
        "engine_checkpoint_models.py::test_files_for_inc_name_the_modules_of_the_model",
        of_models.MODELS,
    ),
    "inc's convolutions": ("contract", "engine_checkpoint_models.py::test_a_patch_embedding_goes_to_inc", None),
    "tensors": ("contract", "engine_checkpoint.py::test_compressed_tensors", None),
    "cache": ("contract", "engine_checkpoint.py::test_a_cache_and_queries", None),
    "experts": ("contract", "engine_checkpoint.py::test_experts_one_by_one", None),
    "groups": ("contract", "engine_checkpoint.py::test_schemes_that_differ_are_groups", None),
    "shards": ("contract", "engine_checkpoint.py::test_several_files_and_what_stands_beside_them", None),
    "models": (
        "contract",
        "engine_checkpoint_models.py::test_every_layer_is_there_and_the_rest_is_as_it_was",
        of_models.MODELS,
    ),
    "modelopt": ("contract", "engine_checkpoint_modelopt.py::test_it_is_what_modelopt_writes", by_modelopt.CASES),
}

Cell = tuple[str, str] | None  # a test, and one of its cases; "" where it has but one
COLUMNS = ("0.17", "0.20.1", "fp8", "vLLM", "INC", "SGLang", "ModelOpt")


def row(readers: str | None, fp8: Cell, vllm: Cell, inc: Cell, tensors: Cell, modelopt: Cell) -> tuple[Cell, ...]:
    """Both versions of compressed-tensors read the same cases."""
    both = ("readers", readers) if readers else None
    return both, both, fp8, vllm, inc, tensors, modelopt


MATRIX: dict[str, tuple[Cell, ...]] = {
    "weights by tensor, static": row(
        "FP8", None, ("in vllm", "static"), ("inc", "full_range"), ("tensors", ""), ("modelopt", "FP8")
    ),
    "weights by channel, dynamic": row(
        "FP8_DYNAMIC", None, ("vllm", "dynamic"), None, ("tensors", ""), ("modelopt", "FP8_DYNAMIC")
    ),
    "weights by channel, static": row("channels, static", None, None, ("inc", by_inc.CHANNELS), None, None),
    "blocks of 128": row(
        "FP8_BLOCK", ("readers", "fp8 blocks"), None, None, ("tensors", ""), ("modelopt", "FP8_BLOCK")
    ),
    "MXFP8": row("MXFP8", ("readers", "fp8 MXFP8"), None, None, ("tensors", ""), ("modelopt", "MXFP8")),
    "W8A16": row("W8A16", None, None, None, ("tensors", ""), None),
    "a cache by tensor": row(
        "cache",
        None,
        ("vllm", "dynamic, a cache"),
        ("inc's operations", ""),
        ("cache", ""),
        ("modelopt", "FP8 and a cache"),
    ),
    "a cache by head": row("cache by head", None, ("in vllm", "static, a cache by head"), None, ("cache", ""), None),
    "the scale of queries": row(
        "queries", None, ("in vllm", "static, queries and a cache"), ("inc's operations", ""), ("cache", ""), None
    ),
    "experts": row(
        "experts", ("readers", "fp8 experts"), ("in vllm", "experts"), None, ("experts", ""), ("modelopt", "experts")
    ),
    "other schemes for some layers": row("groups", None, None, None, ("groups", ""), ("modelopt", "mixed")),
    "a tied head": row(
        "tied head",
        ("fp8", "tied"),
        ("vllm", "dynamic, a tied head"),
        ("inc's names", "tied"),
        None,
        ("models", "tied"),
    ),
    "several files": row(None, None, ("vllm", "dynamic, shards"), None, ("shards", ""), None),
    "linear layers of images (ViT)": row(
        "ViT", ("fp8", "vit"), None, ("inc's names", "vit"), ("models", "vit"), ("models", "vit")
    ),
    "linear layers of images and text (LLaVA)": row(
        "LLaVA", ("fp8", "llava"), None, ("inc's names", "llava"), ("models", "llava"), ("models", "llava")
    ),
    "linear layers of sound (Whisper)": row(
        None, None, None, ("inc's names", "whisper"), ("models", "whisper"), ("models", "whisper")
    ),
    "convolutions (patch embeddings)": row(None, None, None, ("inc's convolutions", ""), None, None),
}


def said_by(cell: Cell) -> str:
    return "—" if cell is None else TESTS[cell[0]][0]


def test_the_table_says_what_the_tests_do():
    expected = [[feature, *map(said_by, cells)] for feature, cells in MATRIX.items()]
    assert table(PAGE, "feature") == expected
    assert all(len(cells) == len(COLUMNS) for cells in MATRIX.values())


@pytest.mark.parametrize("name", TESTS)
def test_the_tests_are_there(name):
    assert why_not(HERE + TESTS[name][1]) is None


@pytest.mark.parametrize("feature", MATRIX)
def test_each_cell_is_a_case_of_its_test(feature):
    for test, case in filter(None, MATRIX[feature]):
        cases = TESTS[test][2]
        assert (case == "") if cases is None else (case in cases), (test, case)


def test_every_case_that_a_reader_runs_has_a_cell():
    """But those that repeat a feature in another format or with another method."""
    named = {cell for cells in MATRIX.values() for cell in cells if cell}
    repeated = {
        "Gaudi's method",
        "static, a cache",
        *(name for name in by_vllm.RUN | by_vllm.LOADED if "modelopt" in name),
    }
    for test in ("readers", "vllm", "in vllm"):
        assert {case for case in TESTS[test][2] if (test, case) not in named} <= repeated
