"""Tokens of experts: counted for every way in which models call them, without padding; stored and merged."""

import pytest
import torch
from moe_models import FAMILIES, tiny_moe
from torch import nn

from optimum_fp8 import FP8Config, calibrate, convert, finalize_calibration, prepare
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.lifecycle.state import state_of
from optimum_fp8.measure import Measurements
from optimum_fp8.measure.experts import ExpertTokens, number_of_experts

IDS = torch.arange(2, 26).view(2, 12)


def counted(model, **inputs):
    prepare(model, FP8Config())
    measurements = state_of(model).measurements
    with torch.no_grad(), state_of(model).observers.only_where(inputs.get("attention_mask"), exact=True):
        model(**inputs)
    return {name: tokens.tolist() for name, tokens in measurements.tokens_of_experts().items()}


def touched(experts, args, kwargs, valid):
    """For each expert, how many rows of the output change when its weights do, which are found by their sizes."""
    number = number_of_experts(experts)
    expected = experts(*args, **kwargs)
    found = []
    for expert in range(number):
        stacks = [p for p in experts.parameters() if p.shape[0] % number == 0]
        kept = [p.clone() for p in stacks]
        for stack in stacks:
            stack.view(number, -1)[expert] *= 1.5
        changed = (experts(*args, **kwargs) != expected).reshape(-1, expected.shape[-1]).any(dim=-1)
        found.append(int((changed & valid.repeat(len(changed) // len(valid))).sum()))
        for stack, values in zip(stacks, kept, strict=True):
            stack.copy_(values)
    return found


@torch.no_grad()
def expected_counts(model, names, **inputs):
    """By calling each module of experts again as the model has called it, with each expert changed."""
    calls = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.update({name: (args, kwargs)}), with_kwargs=True
        )
        for name in names
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    valid = inputs.get("attention_mask", torch.ones_like(IDS)).bool().flatten()
    return {name: touched(model.get_submodule(name), *call, valid) for name, call in calls.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted(family):
    torch.manual_seed(0)
    model = tiny_moe(family)
    found = counted(model, input_ids=IDS)
    assert found
    state_of(model).observers.remove()
    assert found == expected_counts(model, found, input_ids=IDS)
    if family != "longcat_flash":  # where some tokens go to experts without weights
        assert all(sum(tokens) == 2 * IDS.numel() for tokens in found.values())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "dbrx"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(family, side):
    torch.manual_seed(1)
    model = tiny_moe(family)
    mask = torch.ones_like(IDS)
    mask[1, slice(0, 5) if side == "left" else slice(7, None)] = 0
    found = counted(model, input_ids=IDS, attention_mask=mask)
    state_of(model).observers.remove()
    assert found == expected_counts(model, found, input_ids=IDS, attention_mask=mask)
    assert all(sum(tokens) == 2 * (IDS.numel() - 5) for tokens in found.values())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_however_transformers_computes_experts(implementation):
    torch.manual_seed(0)
    model = tiny_moe("mixtral")
    expected = counted(model, input_ids=IDS)
    torch.manual_seed(0)
    model = tiny_moe("mixtral")
    model.set_experts_implementation(implementation)
    assert counted(model, input_ids=IDS) == expected


def test_indices_of_no_expert_do_not_count():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(3, 4, 4)), nn.Parameter(torch.ones(3, 4, 4))

        def forward(self, x, chosen, weights):
            return x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.experts = nn.Linear(4, 4), Experts()

        def forward(self, x):
            chosen = torch.tensor([[0, 3], [-1, 0], [2, 0]], dtype=torch.int32)
            return self.experts(self.proj(x), chosen, weights=torch.ones(3, 2))

    assert counted_block(Block(), torch.ones(3, 4)) == {"experts": [3, 0, 1]}


def counted_block(model, x):
    prepare(model, FP8Config())
    model(x)
    return {name: seen.tolist() for name, seen in state_of(model).measurements.tokens_of_experts().items()}


def test_other_modules_with_such_weights_or_indices_are_not_taken_for_experts():
    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv1d(4, 4, 2, padding=1), nn.Parameter(torch.ones(5, 3, 4))
            self.proj = nn.Linear(4, 4)

        def forward(self, x, positions):
            return self.proj(self.conv(x.mT).mT[:, :-1]) + self.table[positions].sum()

    model = prepare(Looked(), FP8Config())
    model(torch.ones(2, 6, 4), torch.ones(2, 6, dtype=torch.long))
    assert state_of(model).measurements.tokens_of_experts() == {}
    in_fp8 = convert(
        nn.Sequential(nn.Conv1d(4, 4, 2), nn.ConvTranspose1d(4, 4, 2)),
        FP8Config(target="cuda", activation_scheme="dynamic"),
    )
    assert [number_of_experts(each) for each in in_fp8] == [None, None]


def test_counts_are_stored_and_merge_by_addition(tmp_path):
    torch.manual_seed(0)
    model = tiny_moe("mixtral")
    prepare(model, FP8Config(dataset=[{"input_ids": IDS}, {"input_ids": IDS + 20}], dump_stats_path=tmp_path / "m"))
    calibrate(model)
    whole = finalize_calibration(model)
    loaded = Measurements.load(tmp_path / "m")
    (name,) = whole.tokens_of_experts()
    assert torch.equal(loaded.tokens_of_experts()[name], whole.tokens_of_experts()[name])
    assert int(whole.tokens_of_experts()[name].sum()) == 2 * 2 * IDS.numel()
    assert torch.equal(loaded.merged(whole).tokens_of_experts()[name], 2 * whole.tokens_of_experts()[name])
    assert loaded.encoded() == whole.encoded()
    convert(model)  # and they are in nobody's way


def test_experts_have_no_range():
    with pytest.raises(FP8MeasurementError, match="tokens were counted, no range"):
        ExpertTokens(tokens=torch.ones(4, dtype=torch.int64)).range()
