"""Two versions are compared by digests: equal ones pass, and whatever differs is named."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.equal_logits import combinations, differences, digest, main

ONE = "tiny_resnet scale_method=maxabs_hw activation_scheme=static target=gaudi2"


def test_combinations_have_names_of_their_own():
    names = [str(combination) for combination in combinations()]
    assert len(names) == len(set(names)) > 700


@pytest.mark.parametrize(
    "other",
    [
        [("b", torch.ones(2))],
        [("a", torch.ones(2, dtype=torch.int32))],
        [("a", torch.ones(1, 2))],
        [("a", torch.tensor([1.0, 1.0 + 2**-23]))],
        [("a", torch.ones(2)), ("a", torch.ones(2))],
    ],
    ids=["name", "dtype", "shape", "value", "number"],
)
def test_digest_tells_apart(other):
    assert digest([("a", torch.ones(2))]) == digest([("a", torch.ones(2))]) != digest(other)


def test_digest_does_not_depend_on_the_order():
    pairs = [("a", torch.zeros(1)), ("b", torch.ones(1).to(torch.float8_e4m3fn))]
    assert digest(pairs) == digest(reversed(pairs))


def test_differences_are_named():
    found = {"same": {"logits": "1"}, "other": {"logits": "1", "scales": "2"}, "new": {"logits": "1"}}
    expected = {"same": {"logits": "1"}, "other": {"logits": "3", "scales": "2"}, "gone": {"refused": "x"}}
    assert differences(found, expected) == ["gone: only there", "new: only here", "other: logits"]


def test_a_version_equals_itself_and_no_other(tmp_path, capsys):
    path = tmp_path / "before.json"
    assert main(["--only", ONE, "--write", str(path)]) == 0
    assert main(["--only", ONE, "--against", str(path)]) == 0
    stored = json.loads(path.read_text())
    name = next(name for name in stored if name.startswith(ONE))
    stored[name]["scales"] = "0"
    path.write_text(json.dumps(stored))
    assert main(["--only", ONE, "--against", str(path)]) == 1
    assert f"{name}: scales" in capsys.readouterr().out
