"""Checkpoints of Intel Neural Compressor are known, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config
from optimum_fp8.checkpoint.inc import is_incs, refuse_incs
from optimum_fp8.errors import FP8CheckpointError

INC = Path(__file__).parents[1] / "data" / "inc" / "saved"


@pytest.mark.core
def test_a_folder_that_inc_saved_is_named(tmp_path):
    with pytest.raises(FP8CheckpointError, match=r"quantization_config.json was written by Intel Neural Compressor"):
        refuse_incs(INC)
    (tmp_path / "config.json").write_text((INC / "config.json").read_text())
    with pytest.raises(FP8CheckpointError, match=r"config.json was written by .* quantize the original model"):
        refuse_incs(tmp_path)


@pytest.mark.parametrize(
    "said", [{}, {"model_type": "llama"}, FP8Config().to_dict(), {"quantization_config": None}, []]
)
def test_what_inc_did_not_save_is_not_refused(tmp_path, said):
    assert not is_incs(said)
    (tmp_path / "config.json").write_text(json.dumps(said))
    refuse_incs(tmp_path)
    refuse_incs(tmp_path / "nowhere")


@pytest.mark.parametrize("mode", ["AUTO", "QUANTIZE", "MEASURE"])
def test_transformers_itself_refuses_it_in_every_mode(mode):
    with pytest.raises(ValueError, match="no `quant_method`"):
        AutoModelForCausalLM.from_pretrained(INC, quantization_config=FP8Config(mode=mode))
