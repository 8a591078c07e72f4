"""transformers knows the method, its checkpoints and its attention, whatever was imported first."""

from __future__ import annotations

import copy
import pickle

import fresh
import pytest
from hf.conftest import llama
from transformers import AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import optimum_fp8
from optimum_fp8 import FP8Config, hf
from optimum_fp8.attention.function import attention_forward
from optimum_fp8.hf.quantizer import FP8Quantizer

CHECK = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig
config = AutoQuantizationConfig.from_dict({"quant_method": "optimum_fp8", "target": "gaudi2"})
assert type(config).__name__ == "FP8Config" and config.target == "gaudi2"

from transformers import AttentionInterface, AttentionMaskInterface
assert AUTO_QUANTIZER_MAPPING["optimum_fp8"].__name__ == "FP8Quantizer"
assert "optimum_fp8" in AttentionInterface() and "optimum_fp8" in AttentionMaskInterface()
waiting = {finder.name for finder in sys.meta_path if type(finder).__module__.startswith("optimum_fp8")}
assert not waiting
"""

LOAD = """
import sys, optimum_fp8
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="optimum_fp8")
print(optimum_fp8.quantization_report(model))
config = optimum_fp8.FP8Config(activation_scheme="dynamic", attention=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config)
print(optimum_fp8.quantization_report(model))
"""


@pytest.mark.core
@pytest.mark.parametrize(
    "first",
    [
        "import optimum_fp8",
        pytest.param("import transformers, optimum_fp8", marks=pytest.mark.slow),
        pytest.param("import transformers.quantizers.auto, optimum_fp8", marks=pytest.mark.slow),
        pytest.param("from transformers import LlamaForCausalLM; import optimum_fp8", marks=pytest.mark.slow),
        pytest.param("from optimum_fp8 import FP8Config", marks=pytest.mark.slow),
        pytest.param("import optimum_fp8.modules", marks=pytest.mark.slow),
        pytest.param("import pickle; pickle.loads(b'coptimum_fp8.config\\nFP8Config\\n.')", marks=pytest.mark.slow),
    ],
)
def test_registered_in_whatever_order(first):
    fresh.TORCH.run(first + CHECK)


def test_a_fresh_process_loads_and_quantizes(save):
    plain = save(llama())
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=FP8Config(activation_scheme="dynamic"))
    model.save_pretrained(plain + "-fp8")
    printed = fresh.TRANSFORMERS.run(LOAD, plain + "-fp8", plain)
    assert printed.count("14 of 15 candidate modules in FP8") == 2


@pytest.mark.core
def test_registering_again_is_harmless():
    hf.register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["optimum_fp8"] is FP8Config
    assert AUTO_QUANTIZER_MAPPING["optimum_fp8"] is FP8Quantizer
    assert AttentionMaskInterface()["optimum_fp8"] is eager_mask
    from transformers import AttentionInterface

    assert AttentionInterface()["optimum_fp8"] is attention_forward


THREADS = """
import sys, threading
import torch, transformers

statements = sys.argv[1:]
gate = threading.Barrier(len(statements))
failed = []

def work(statement):
    gate.wait()
    try:
        exec(statement, {})
    except BaseException as error:
        failed.append(f"{statement}: {error!r}")

threads = [threading.Thread(target=work, args=(statement,)) for statement in statements]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failed, failed
"""


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(["import optimum_fp8", "import transformers.modeling_utils"], marks=pytest.mark.slow),
        pytest.param(
            ["from optimum_fp8 import FP8Config"] * 2 + ["from optimum_fp8 import prepare"], marks=pytest.mark.slow
        ),
        [
            "from optimum_fp8 import prepare, quantization_report",
            "import transformers.modeling_utils",
            "from optimum_fp8 import calibrate, scales",
        ],
    ],
    ids=["both ends", "the same", "all"],
)
def test_threads_may_race_on_the_first_import(statements):
    fresh.TORCH.run(THREADS + CHECK, *statements)


ORDER = """
import importlib.abc, sys

class Spy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("transformers.modeling_utils", "optimum_fp8.quantize", "optimum_fp8.selection"):
            print(name)

import optimum_fp8
sys.meta_path.insert(0, Spy())
optimum_fp8.prepare
"""


def test_transformers_is_imported_while_nothing_of_ours_is():
    """Python lets a thread go on with half imported modules where another one imports them in the other order."""
    assert fresh.TORCH.run(ORDER).split()[0] == "transformers.modeling_utils"


UNPICKLE = """
import pickle, sys

with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
from transformers.quantizers.auto import AutoHfQuantizer
print(type(AutoHfQuantizer.from_config(config)).__name__)
with open(sys.argv[1], "wb") as file:
    pickle.dump(config, file)
"""


def test_configs_are_copied_and_pickled_and_reach_other_processes(tmp_path):
    config = FP8Config(target="gaudi3", scale_method="maxabs_pow2")
    assert copy.deepcopy(config) == copy.copy(config) == pickle.loads(pickle.dumps(config)) == config
    path = tmp_path / "config"
    path.write_bytes(pickle.dumps(config))
    assert fresh.TRANSFORMERS.run(UNPICKLE, str(path)) == "FP8Quantizer\n"
    assert pickle.loads(path.read_bytes()) == config
    assert optimum_fp8.FP8Config is FP8Config
