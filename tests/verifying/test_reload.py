"""What the fresh process computes and tells, here in this one."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_fp8.checkpoint.digests import digests
from optimum_fp8.verifying.reload import HOW, INPUTS, LOGITS, STATE, main


def test_logits_and_digests_of_what_is_loaded(made, tmp_path):
    ids = torch.tensor([[1, 5, 9]])
    save_file({"a": ids}, tmp_path / INPUTS)
    how = {"class": "LlamaForCausalLM", "dtype": "bfloat16", "device": "cpu", "attention": "sdpa"}
    (tmp_path / HOW).write_text(json.dumps({**how, "threads": torch.get_num_threads()}))
    main(str(made["ours"]), str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(made["ours"])
    assert torch.equal(load_file(tmp_path / LOGITS)["a"], model(ids).logits.float())
    assert json.loads((tmp_path / STATE).read_text()) == digests(model.state_dict())
