"""FP8 checkpoints under transformers' tensor- and expert-parallel plans, in two real processes."""

from __future__ import annotations

import pytest
import torch
from moe_models import TEXT, tiny_moe
from ranks import succeed
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.hf.parallel_plan import _check_blocks, _part, check_plan, keep_whole
from optimum_fp8.scales import PerBlock, PerChannel, PerGroup

IDS = torch.arange(2, 50).view(2, 24)
SCHEMES = {
    "static": {},
    "channels": {"activation_scheme": "weight_only", "scale_method": "act_maxabs_hw_weights_pcs_maxabs_pow2"},
}

BODY = """
import torch, optimum_fp8
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.modules import FP8Module
from optimum_fp8.modules.fused_experts import FP8FusedExperts

ids = torch.arange(2, 50).view(2, 24)
torch.set_grad_enabled(False)


def bytes_of(model):
    kinds = (FP8Module, FP8FusedExperts)
    codes = [p for m in model.modules() if isinstance(m, kinds) for p in m.parameters() if p.element_size() == 1]
    return sum(each.numel() for each in codes)


for folder, arguments in CASES:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**arguments))
    expected, found = whole(ids).logits, model(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-5, (folder, arguments)
    assert bytes_of(model) < 0.62 * bytes_of(whole), "this process holds its part"
    tokens = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, whole.generate(ids[:, :5], max_new_tokens=4, do_sample=False))
    for refused in (model.dequantize, lambda: model.save_pretrained("again")):
        try:
            refused()
        except FP8NotAvailableError as error:
            assert "spreads this model over processes" in str(error), error
        else:
            raise AssertionError("it was not refused")
for folder, arguments, message in REFUSED:
    try:
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**arguments))
    except FP8NotAvailableError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"{folder} was not refused")
"""


def saved(family: str, scheme: str, folder) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval() if family == "llama" else tiny_moe(family)
    prepare(model, FP8Config(**SCHEMES[scheme]))
    with torch.no_grad():
        model(IDS)
    convert(model).save_pretrained(folder / f"{family}-{scheme}")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    cases = []
    for scheme in SCHEMES:
        for family in ("llama", "mixtral", "granitemoe"):
            saved(family, scheme, tmp_path)
            plans = [{"tp_size": 2}] if family == "llama" else [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}]
            cases += [(f"{family}-{scheme}", plan) for plan in plans]
    saved("longcat_flash", "static", tmp_path)
    refused = [("longcat_flash-static", {"tp_size": 2}, "experts of LongcatFlashExperts in FP8 cannot be spread by")]
    succeed(f"CASES, REFUSED = {cases!r}, {refused!r}\n{BODY}", 2, tmp_path)


def test_what_cannot_be_spread_is_refused():
    model = tiny_moe("mixtral")
    check_plan(model, is_checkpoint=False)
    model.config.distributed_config = DistributedConfig(tp_size=2)
    check_plan(model, is_checkpoint=True)
    with pytest.raises(FP8NotAvailableError, match="quantizing while loading.*can be loaded under a plan"):
        check_plan(model, is_checkpoint=False)
    model.config.distributed_config = DistributedConfig(tp_size=2, fsdp_size=2)
    with pytest.raises(FP8NotAvailableError, match="fsdp_size, dp_replicate_size and pp_size"):
        check_plan(model, is_checkpoint=True)


def test_experts_that_cannot_be_spread_evenly_are_refused():
    model = convert(tiny_moe("mixtral"), FP8Config(activation_scheme="weight_only"))
    model.config.distributed_config = DistributedConfig(tp_size=3, ep_size=3)
    with pytest.raises(FP8NotAvailableError, match="4 experts cannot be spread evenly over 3 processes"):
        keep_whole(model, dict(model.ep_plan))


def test_parts_of_packed_weights_lie_behind_each_other():
    weight = torch.arange(16.0).reshape(8, 2)
    assert torch.equal(_part("m", weight, 0, 1, 2), weight[4:])
    assert torch.equal(_part("m", weight, 0, 1, 2, packed=2), torch.cat([weight[2:4], weight[6:]]))
    codes = weight.to(torch.float8_e4m3fn)
    assert torch.equal(_part("m", codes, 1, 0, 2).float(), weight[:, :1])
    with pytest.raises(FP8NotAvailableError, match="m: 8 values along dimension 0 cannot be spread evenly over 3"):
        _part("m", weight, 0, 0, 3)


@pytest.mark.parametrize("granularity, dim, fits", [
    (PerBlock(128, 128), 0, False), (PerBlock(1, 128), 0, True), (PerBlock(1, 128), 1, False),
    (PerGroup(32), 1, True), (PerGroup(128), 1, False), (PerChannel(), 0, True), (PerChannel(), 1, True),
])  # fmt: skip
def test_parts_end_where_blocks_end(granularity, dim, fits):
    part = torch.zeros(96, 96)
    if fits:
        _check_blocks("m", granularity, part, dim, 1)
    else:
        with pytest.raises(FP8NotAvailableError, match="96 values along dimension ., which is no multiple of 128"):
            _check_blocks("m", granularity, part, dim, 1)
