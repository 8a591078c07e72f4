"""`import optimum_fp8` is light: it gets ready to register, and does no other work."""

import json
import subprocess
import sys

import pytest

import optimum_fp8

pytestmark = pytest.mark.core


def run(script: str, folder) -> str:
    """What a script prints last, in a process of its own."""
    answer = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()[-1]


def imported(statements: str, folder) -> set[str]:
    """The modules that a fresh process has after some statements."""
    return set(json.loads(run(f"{statements}\nimport json, sys\nprint(json.dumps(list(sys.modules)))", folder)))


def test_import_is_light(tmp_path):
    found = imported("import optimum_fp8", tmp_path)
    assert found.isdisjoint({"torch", "transformers", "numpy", "datasets"})
    ours = {name for name in found if name.startswith("optimum_fp8")}
    assert ours == {"optimum_fp8", "optimum_fp8.hf", "optimum_fp8.import_hook"}


def test_import_beside_transformers_is_light(tmp_path):
    before = imported("import torch, transformers", tmp_path)
    after = imported("import torch, transformers, optimum_fp8", tmp_path)
    assert {name for name in after - before if name.startswith(("torch", "transformers"))} == set()


def test_what_loading_needs_brings_no_more_than_it(tmp_path):
    found = imported("import transformers.modeling_utils, optimum_fp8", tmp_path)
    assert "optimum_fp8.hf.quantizer" in found
    assert found.isdisjoint({"datasets", "triton", "habana_frameworks", "optimum_fp8.report", "optimum_fp8.commands"})
    assert not [name for name in found if name.startswith("transformers.models.") and ".modeling_" in name]


# Two threads that import from either end would wait for each other if ours needed what they are imported after.
@pytest.mark.parametrize(
    "ours, after",
    [
        ("config", "transformers.quantizers.auto"),
        ("hf.quantizer", "transformers.modeling_utils"),
        ("modules.attention", "transformers.modeling_utils"),
        ("modules.attention", "transformers.masking_utils"),
    ],
)
def test_what_is_registered_does_not_import_what_it_waits_for(tmp_path, ours, after):
    assert after not in imported(f"import optimum_fp8.{ours}", tmp_path)


def test_import_does_not_touch_cuda(tmp_path):
    script = "import torch, transformers.modeling_utils, optimum_fp8; print(torch.cuda.is_initialized())"
    assert run(script, tmp_path) == "False"


def test_public_names():
    namespace: dict[str, object] = {}
    exec("from optimum_fp8 import *", namespace)
    del namespace["__builtins__"]
    assert sorted(namespace) == optimum_fp8.__all__
    assert set(optimum_fp8.__all__) <= set(dir(optimum_fp8))
    for name in set(optimum_fp8.__all__) - {"ops", "scales"}:  # and none is the module that it comes from
        assert callable(getattr(optimum_fp8, name))
    assert optimum_fp8.errors.FP8Error and optimum_fp8.ops.linear and optimum_fp8.scales.SCALE_METHODS


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="'optimum_fp8' has no attribute 'nonsense'"):
        optimum_fp8.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from optimum_fp8 import nonsense  # noqa: F401
    assert not hasattr(optimum_fp8, "config_inc_nonsense")
