"""What is said to torch's compiler without importing it."""

from __future__ import annotations

import json

import fresh
import torch

from optimum_fp8.ops.compiling import constant_while_compiling


def test_it_marks_a_function_as_torch_does():
    def ours() -> None: ...

    def torchs() -> None: ...

    assert vars(constant_while_compiling(ours)) == vars(torch.compiler.assume_constant_result(torchs)) != {}


def test_importing_operators_does_not_import_the_compiler():
    script = "import json, sys, torch, optimum_fp8.ops; print(json.dumps('torch._dynamo' in sys.modules))"
    assert json.loads(fresh.cold(script)) is False
