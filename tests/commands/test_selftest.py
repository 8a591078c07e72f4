"""`optimum-cli fp8 selftest`: a table on the standard output, values in a file, a status that tells."""

from __future__ import annotations

import json
from argparse import ArgumentParser

import pytest
from optimum.commands.register.register_fp8 import FP8SelftestCommand

from optimum_fp8 import ops
from optimum_fp8.commands.selftest import main
from optimum_fp8.ops import dispatch


@pytest.fixture
def run(capsys):
    def run(*arguments: object):
        parser = ArgumentParser()
        FP8SelftestCommand.parse_args(parser)
        status = main(parser.parse_args([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.core
def test_it_passes_on_the_cpu_and_writes_what_it_found(tmp_path, run):
    file = tmp_path / "found.json"
    status, out, err = run("--device", "cpu", "--operator", "linear", "--operator", "matmul", "--json", file)
    assert status == 0 and err == "" and out.splitlines()[-1].startswith("OK on cpu: ")
    found = json.loads(file.read_text())
    assert found["ok"] and found["device"] == found["target"] == "cpu" and found["summary"] == out.splitlines()[-1]
    assert {row["operator"] for row in found["rows"]} == {"linear", "matmul"}
    assert {row["kernel"] for row in found["rows"] if row["operator"] == "linear"} == {ops.cpu.backends()[0]}
    assert out.count("\nlinear ") + out.count("\nmatmul ") == len(found["rows"])


def test_a_backend_alone_with_the_formats_of_a_target(run):
    status, out, _ = run("--device", "cpu", "--backend", "cpu_portable", "--target", "gaudi2", "--operator", "maxabs")
    assert status == 0 and "target        gaudi2" in out and "ran on: cpu_portable" in out
    assert "[1] backend 'cpu_portable' cannot run 'maxabs' here" in out and "refused" in out.splitlines()[-1]


def test_a_failure_is_the_status(monkeypatch, run):
    monkeypatch.setattr(dispatch, "_kernels", {op: [*kernels] for op, kernels in dispatch._kernels.items()})
    ops.register_kernel("maxabs", ops.Kernel("wrong", ("cpu",), lambda call: call.x.new_zeros(1).float()))
    status, out, _ = run("--operator", "maxabs", "--device", "cpu")
    assert status == 1 and out.splitlines()[-1].startswith("NOT OK on cpu") and "FAIL" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "error: device 'tpu' is unknown"),
        (["--device", "cpu", "--operator", "gemm"], "error: operator 'gemm' is unknown"),
        (["--device", "cpu", "--operator", "maxabs", "--json", "/no/such/folder/f.json"], "error: "),
    ],
)
def test_errors_are_one_line(arguments, message, run):
    status, out, err = run(*arguments)
    assert status == 1 and out == "" and err.startswith(message) and err.count("\n") == 1
