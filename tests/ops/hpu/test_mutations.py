"""Every mistake in a call of Gaudi's operators fails a test: a scale inverted, arguments or overloads exchanged.

`gaudi_mutations.py` lists the mistakes, and of each a test that fails with it. Every argument of every call has one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import torch
from gaudi_mutations import FAILS
from mutants import PACKAGE, Mutants, Mutation

from optimum_fp8.test_utils.gaudi.device import BRIDGES
from optimum_fp8.test_utils.gaudi.schemas import SCHEMAS

ROWS = [
    pytest.param(Mutation(file, old, new), test, id=f"{file}-{number}")
    for file, mutations in FAILS.items()
    for number, (old, test, new) in enumerate((old, *row) for old, rows in mutations.items() for row in rows)
]
TESTS = sorted({test for mutations in FAILS.values() for rows in mutations.values() for test, _ in rows})
MISTAKES = ("NameError", "UnboundLocalError", "AttributeError", "ImportError", "SyntaxError")  # of the mutation itself
OVERLOADS = {schema.partition("(")[0]: torch._C.parse_schema(f"hpu::{schema}") for schema in SCHEMAS[BRIDGES[-1]]}
RECIPROCALS = ("reciprocal()", "1.0 / ", "inverse_of(")
ONES = ("1.0", "None", "torch.ones_like(scale)")  # are their own reciprocals
KERNEL = re.compile(r"operator\(.*\)|kernels\.\w+")  # what is called: `operator("softmax_fp8")`
SCALE = re.compile(r"scale(?![A-Z])")  # in the name of an argument


@pytest.fixture(scope="module")
def mutants() -> Iterator[Mutants]:
    process = Mutants(*sorted({test.partition("::")[0] for test in TESTS}))
    yield process
    process.close()


@pytest.mark.slow
def test_without_a_mutation_none_of_these_tests_fails(mutants):
    assert mutants.failures(None, *TESTS) == {}


@pytest.mark.slow
@pytest.mark.parametrize("mutation, test", ROWS)
def test_a_mutant_fails(mutants, mutation, test):
    failures = mutants.failures(mutation, test)
    assert failures, f"{test} passes although {mutation.file} has {mutation.new!r} for {mutation.old!r}"
    assert not failures[test].startswith(MISTAKES), failures


# --- every argument has its mutations ---------------------------------------------------------------------------------


def has_overloads(operator: str) -> bool:
    """Whether what is called, as `operator("cast_from_fp8")`, has several overloads."""
    return sum(name.split(".")[0] in operator.split("'") for name in OVERLOADS) > 1


def names_of(operator: str) -> list[str]:
    """The names of what is called's positional arguments, by the schema of its overload."""
    overload = ".".join(operator.split("'")[1::2])
    return [argument.name for argument in OVERLOADS[overload].arguments] if overload in OVERLOADS else []


def arguments(source: str) -> dict[str, str]:
    """What a file gives to the bridge's operators: the overload and each argument of each call.

    Where arguments come from a dictionary (`**arguments`), each entry that the file puts in one counts as such.
    """
    found: dict[str, str] = {}
    nodes = list(ast.walk(ast.parse(source)))
    calls = [node for node in nodes if isinstance(node, ast.Call) and KERNEL.fullmatch(ast.unparse(node.func))]
    for place, call in enumerate(calls):
        operator = ast.unparse(call.func)
        if has_overloads(operator):
            found[f"{place}: the overload"] = operator
        named = zip(names_of(operator), call.args, strict=False)
        for name, value in [*named, *((each.arg, each.value) for each in call.keywords if each.arg)]:
            found[f"{place}: {name}"] = ast.unparse(value)
    if not any(keyword.arg is None for call in calls for keyword in call.keywords):
        return found
    for node in nodes:
        entries = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
        assigned = node.targets if isinstance(node, ast.Assign) else ()
        subscripts = [part for target in assigned for part in ast.walk(target) if isinstance(part, ast.Subscript)]
        named = [*entries, *((part.slice, node) for part in subscripts)]
        for key, value in named:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                place = sum(label.endswith(f"[{key.value}]") for label in found)
                found[f"{place}: entry [{key.value}]"] = ast.unparse(value)
    return found


def inverted(one: str, other: str) -> bool:
    """Whether one of two expressions has a reciprocal, and the other does not."""
    return len({any(way in text for way in RECIPROCALS) for text in (one, other)}) == 2


def lacking(source: str, mutants: list[str]) -> set[str]:
    """The arguments that a file gives to operators and that no mutant changes, and the scales that none inverts."""
    given = arguments(source)
    changed, flipped = set(), set()
    for mutant in map(arguments, mutants):
        changed |= {label for label, text in given.items() if mutant.get(label) != text}
        flipped |= {label for label, text in given.items() if inverted(text, mutant.get(label, text))}
    scales = {label for label, text in given.items() if SCALE.search(label) and text not in ONES}
    return {f"{label} = {given[label]}" for label in (given.keys() - changed) | (scales - flipped)}


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops" / "hpu").glob("*.py")), ids=lambda path: path.name)
def test_every_argument_of_every_call_has_a_mutation_and_every_scale_its_reciprocal(path):
    file = str(path.relative_to(PACKAGE))
    rows = [row.values[0].source() for row in ROWS if row.values[0].file == file]
    assert lacking(path.read_text(), rows) == set()


def test_every_mutant_is_a_program():
    for mutation, _ in (row.values for row in ROWS):
        compile(mutation.source(), mutation.file, "exec")


def test_an_argument_without_a_mutation_is_found():
    source = 'operator("softmax_fp8", "Scalar_scales")(x, -1, s, 1.0 / t)'
    every = [source.replace("(x, -1", "(x, 1"), source.replace("x,", "y,"), source.replace("Scalar_scales", "Scalar")]
    assert lacking(source, every) == {"0: input_scale = s", "0: output_scale = 1.0 / t"}
    every += [source.replace(" s,", " t,"), source.replace("1.0 / t", "t")]
    assert lacking(source, every) == {"0: input_scale = s"}, "changed, but not inverted"
    assert lacking(source, [*every, source.replace(" s,", " 1.0 / s,")]) == set()
    keywords = "kernels.fp8_fused_sdpa(d_scale_q=s, q_scale_s=inverse_of(t))"
    every = [keywords.replace("s, ", "t, "), keywords.replace("inverse_of(t)", "t")]
    assert lacking(keywords, every) == {"0: d_scale_q = s"}
    assert lacking('operator("m", "_".join(words))(x=y).to(z)', []) == {"0: x = y"}
    gathered = 'given["w1"] = down\nkernels.fp8_fused_sdpa(**{"d_scale_q": scale}, **given)'
    assert lacking(gathered, []) == {"0: entry [d_scale_q] = scale", "0: entry [w1] = given['w1'] = down"}
