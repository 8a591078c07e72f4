"""`import optimum_fp8` is light: it gets ready to register, and does no other work."""

import json

import fresh
import pytest

import optimum_fp8

pytestmark = pytest.mark.core

# One process for all that is asked about imports which take seconds.
STEPS = """
import json, sys
seen = set()

def brought():
    new = sorted(sys.modules.keys() - seen)
    seen.update(new)
    return new

import torch, transformers
before = brought()
import optimum_fp8
ours = brought()
import transformers.modeling_utils
loading = brought()
print(json.dumps({"before": before, "ours": ours, "loading": loading, "cuda": torch.cuda.is_initialized()}))
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The modules that each step brings, from no other folder than the installed ones."""
    return json.loads(fresh.cold(STEPS, tmp_path_factory.mktemp("elsewhere")))


def of_the_package(names) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "optimum_fp8"}


def test_import_is_light(tmp_path):
    script = "import optimum_fp8, json, sys; print(json.dumps(list(sys.modules)))"
    found = json.loads(fresh.cold(script, tmp_path))
    assert {"torch", "transformers", "numpy", "datasets"}.isdisjoint(found)
    assert of_the_package(found) == {"optimum_fp8", "optimum_fp8.hf", "optimum_fp8.import_hook"}


@pytest.mark.slow
def test_import_beside_transformers_is_light(steps):
    assert not [name for name in steps["ours"] if name.startswith(("torch", "transformers"))]


@pytest.mark.slow
def test_what_loading_needs_brings_no_more_than_it(steps):
    assert "optimum_fp8.hf.quantizer" in steps["loading"]
    found = {name for names in (steps["before"], steps["ours"], steps["loading"]) for name in names}
    assert found.isdisjoint({"datasets", "triton", "habana_frameworks", "optimum_fp8.report", "optimum_fp8.commands"})
    assert not [name for name in found if name.startswith("transformers.models.") and ".modeling_" in name]


@pytest.mark.slow
def test_import_does_not_touch_cuda(steps):
    assert steps["cuda"] is False


# Two threads that import from either end would wait for each other if ours needed what they are imported after.
@pytest.mark.parametrize(
    "ours, after",
    [
        ("config", ["transformers.quantizers.auto"]),
        ("hf.quantizer", ["transformers.modeling_utils"]),
        ("attention.function", ["transformers.modeling_utils", "transformers.masking_utils"]),
    ],
)
def test_what_is_registered_does_not_import_what_it_waits_for(ours, after):
    found = json.loads(fresh.TORCH.run(f"import optimum_fp8.{ours}, json, sys; print(json.dumps(list(sys.modules)))"))
    assert f"optimum_fp8.{ours}" in found and set(after).isdisjoint(found)


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
