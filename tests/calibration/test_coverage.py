"""What calibration data leave out is said at its end: names, numbers, what to do."""

import logging

import pytest
import torch
from moe_models import tiny_moe
from tiny_models import tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, calibrate, convert, prepare
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.lifecycle.state import state_of
from optimum_fp8.measure import Observer, Statistic, register_observer


class Switched(nn.Module):
    """Experts that are modules of their own, each called with its tokens; a layer that nothing calls."""

    def __init__(self):
        super().__init__()
        self.gate, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(3))

    def forward(self, x):
        x = self.gate(x)
        return torch.cat([self.experts[0](x), self.experts[2](x[:1])])


def said(caplog, model, dataset, **options):
    caplog.set_level(logging.WARNING)
    calibrate(prepare(model, FP8Config(dataset=dataset, **options)))
    return [record.getMessage() for record in caplog.records if record.name.startswith("optimum_fp8.calibration")]


def ids(*shape):
    return {"input_ids": torch.randint(1, 64, shape)}


def test_nothing_is_said_of_enough_data(caplog):
    assert said(caplog, tiny_llama(), [ids(4, 64) for _ in range(5)]) == []


def test_few_tokens(caplog):
    (line,) = said(caplog, tiny_llama(), [ids(2, 10)])
    assert line == "calibrated on 20 tokens only: ranges will not be representative; use more data"


def test_repeated_samples(caplog):
    batch = ids(10, 64)
    (line,) = said(caplog, tiny_llama(), [batch, ids(10, 64), batch])
    assert line.startswith("10 of 30 calibration samples were the same as an earlier one") and "different ones" in line


def test_modules_that_were_not_reached(caplog):
    model = Switched()
    (line,) = said(caplog, model, [torch.randn(6, 4)])
    assert line.startswith(
        "3 selected modules were not reached by the calibration data: spare, experts.1.0, experts.1.1: "
    )
    with pytest.raises(
        FP8MeasurementError, match="3 selected modules were never reached by calibration: spare, experts.1.0"
    ):
        convert(model)


def test_data_that_call_the_model_by_themselves(caplog):
    (line,) = said(caplog, Switched(), lambda model: model(torch.randn(6, 4)))
    assert line.startswith("3 selected modules were not reached")


def test_experts_that_got_no_token(caplog):
    model = tiny_moe("mixtral")
    same = [{"input_ids": torch.full((1, length), 7)} for length in range(40, 64)]  # all go to the same two
    (line,) = said(caplog, model, same)
    counts = state_of(model).measurements.tokens_of_experts()["model.layers.0.mlp.experts"]
    one, other = (f"model.layers.0.mlp.experts {number}" for number in torch.where(counts == 0)[0].tolist())
    assert line == f"2 of 4 experts got no token: {one}, {other}: use more samples, or more varied ones"


def test_experts_with_few_tokens(caplog):
    torch.manual_seed(0)
    model = tiny_moe("qwen3_moe")
    lines = said(caplog, model, [ids(1, 1), ids(1, 1), ids(20, 64)], min_tokens_per_module=20 * 64 * 2)
    (counts,) = state_of(model).measurements.tokens_of_experts().values()
    shown = sorted((count, f"model.layers.0.mlp.experts {n} ({count})") for n, count in enumerate(counts.tolist()))
    assert f"4 of 4 experts got fewer than 2560 tokens: {', '.join(name for _, name in shown)}: use more" in lines[0]
    assert (
        lines[1].startswith("4 modules got fewer than 2560 tokens: model.layers.0.self_attn.") and "(1282)" in lines[1]
    )


@pytest.mark.parametrize(("least", "few"), [(0, []), (1, []), (2, ["2 (1)"]), (6, ["2 (1)"]), (7, ["0 (6)", "2 (1)"])])
def test_experts_of_their_own_modules_are_counted_by_their_inputs(caplog, least, few):
    lines = said(caplog, Switched(), [torch.randn(6, 4)], min_tokens_per_module=least)
    modules = [line for line in lines if "modules got" in line]
    experts = [line for line in lines if "experts got" in line]
    assert modules == (
        ["1 modules got fewer than 7 tokens: gate (6): use more samples, or more varied ones"] if least > 6 else []
    )
    shown = ", ".join(sorted((f"experts {each}" for each in few), key=lambda each: each.split("(")[1]))
    assert experts == (
        [f"{len(few)} experts got fewer than {least} tokens: {shown}: use more samples, or more varied ones"]
        if few
        else []
    )


def test_padding_is_no_token(caplog):
    batch = ids(20, 64) | {"attention_mask": torch.ones(20, 64, dtype=torch.long)}
    batch["attention_mask"][0, 10:] = 0
    lines = said(caplog, tiny_llama(), [batch], min_tokens_per_module=20 * 64)
    assert len(lines) == 1 and f"({20 * 64 - 54})" in lines[0]


def test_an_observer_that_does_not_count(caplog):
    @register_observer
    class Peak(Observer):
        name = "test_peak"
        STATISTICS = {"peak": Statistic(torch.maximum)}

        def update(self, x):
            self.accumulate(peak=x.abs().amax().float())

        def range(self):
            return self.statistics()["peak"]

    (line,) = said(caplog, tiny_llama(), [ids(20, 64)], observer="test_peak", min_tokens_per_module=5)
    assert line.startswith("min_tokens_per_module=5: observer='test_peak' does not count values")


def test_convolutions_take_no_tokens(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten())
    assert said(caplog, model, [torch.randn(1, 3, 2, 2)], min_tokens_per_module=5) == []
