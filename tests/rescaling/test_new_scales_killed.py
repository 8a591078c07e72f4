"""rescale and requantize, killed: the output is whole or not there, and the checkpoint it is made of as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh import Interpreter
from kill_points import POINTS, kill_scripts_at_random_points
from rescaling.conftest import assert_same_tensors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_fp8 import FP8CheckpointError, FP8Config

WRITING = """
import sys, time
from optimum_fp8.rescaling import {module} as module
def told(*arguments, write=module.write_checkpoint):
    print(time.monotonic(), flush=True)
    write(*arguments)
module.write_checkpoint = told
"""
RESCALE = (
    WRITING.format(module="new_scales")
    + """
module.rescale(*sys.argv[1:], target="gaudi2", scale_method="maxabs_pow2", max_shard_size="300KB")
"""
)
REQUANTIZE = (
    WRITING.format(module="new_format")
    + """
import torch
from optimum_fp8 import FP8Config
data = [{"input_ids": torch.arange(24).reshape(2, 12)} for _ in range(2)]
module.requantize(*sys.argv[1:], FP8Config.preset("FP8", dataset=data))
"""
)


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter("optimum_fp8.hf.quantizer", "optimum_fp8.rescaling", "rescaling.llama_known")
    yield interpreter
    interpreter.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def loads(folder: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, FP8CheckpointError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("script", [RESCALE, REQUANTIZE], ids=["rescale", "requantize"])
def test_the_output_is_whole_or_not_there(fp8, interpreter, tmp_path, script):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).bfloat16()
    source = fp8(FP8Config(activation_scheme="dynamic", scale_method="maxabs_arbitrary", target="gaudi3"), model)
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")  # a file that goes along
    before, made = contents(source), tmp_path / "made"
    interpreter.run(script, str(source), str(made / "whole"))
    expected, there, seen = contents(made / "whole"), [], set()
    names = {"whole", *map(str, range(POINTS + 2))}

    def check(number):
        assert contents(source) == before
        if (made / str(number)).exists():
            there.append(number)
            assert contents(made / str(number)) == expected
        for left in set(made.glob(".*")) - seen:
            seen.add(left)
            if loads(left):  # only its name was to change
                assert_same_tensors(left, made / "whole")
        assert all(each.name.startswith(".fp8-") or each.name in names for each in made.iterdir())

    kill_scripts_at_random_points(interpreter, script, lambda number: (source, made / str(number)), check)
    assert len(there) < POINTS and seen
