"""Observers record what goes through modules and leave no trace."""

import copy

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, Measurements, convert, prepare
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure import Observers

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")


@pytest.fixture
def watch():
    """Watch all Linears of a model; gives the observers and what they measure."""

    def watch(model, kinds=("input", "output")):
        observers = Observers(Measurements("f"), kinds)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                observers.attach(name, module)
        return observers, observers.measurements

    return watch


def test_the_range_is_the_maximum_over_all_batches(watch):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    _, measurements = watch(model)
    batches = [torch.randn(5, 4) * scale for scale in (1, 7, 2)]
    outputs = [model(x) for x in batches]
    assert measurements.range("0") == torch.cat(batches).abs().max()
    assert measurements.range("1", "output") == torch.cat(outputs).abs().max()
    assert measurements.tensors["0", "input"].statistics()["count"] == 3 * 5 * 4


@pytest.mark.parametrize("kinds", [("input",), ("output",), ()])
def test_only_the_kinds_asked_for_are_recorded(watch, kinds):
    model = nn.Sequential(nn.Linear(4, 3))
    _, measurements = watch(model, kinds)
    model(torch.randn(5, 4))
    assert set(measurements.tensors) == {("0", kind) for kind in kinds}


@pytest.mark.core
def test_inputs_given_by_keyword_are_seen(watch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=x)

    model = Net()
    _, measurements = watch(model)
    model(torch.full((1, 4), 2.0))
    assert measurements.range("fc") == 2.0


@pytest.mark.core
@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4)], ids=["batch, length", "batch · length"])
def test_padding_is_left_out(watch, shape):
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    observers, measurements = watch(model)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    x = torch.ones(2, 3, 4)
    x[1, 0] = 100.0
    with observers.only_where(mask):
        model(x.reshape(shape))
    assert measurements.range("0") == 1.0
    assert measurements.tensors["0", "input"].statistics()["count"] == 5 * 4
    model(x.reshape(shape))
    assert measurements.range("0") == 100.0, "the mask ends with its block"


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3)], ids=["none", "full"])
def test_no_padding_leaves_nothing_out(watch, mask):
    model = nn.Sequential(nn.Linear(4, 3))
    observers, measurements = watch(model)
    with observers.only_where(mask):
        model(torch.ones(2, 3, 4))
    assert measurements.tensors["0", "input"].statistics()["count"] == 24


def test_shapes_that_do_not_fit_the_mask_are_seen_whole(watch):
    model = nn.Sequential(nn.Linear(4, 3))
    observers, measurements = watch(model)
    with observers.only_where(torch.tensor([[1, 0, 0]])):
        model(torch.ones(2, 4))  # a pooled token a row, for example
    assert measurements.tensors["0", "input"].statistics()["count"] == 8


def test_a_batch_of_only_padding_and_an_empty_batch_say_nothing(watch):
    model = nn.Sequential(nn.Linear(4, 3))
    observers, measurements = watch(model)
    with observers.only_where(torch.zeros(1, 2)):
        model(torch.ones(1, 2, 4))
    model(torch.ones(0, 4))
    assert not measurements.tensors


@pytest.mark.core
def test_taken_off_they_leave_no_trace(watch):
    model = nn.Sequential(nn.Linear(4, 3))
    before = set(vars(model[0]))
    calls = []
    handle = model[0].register_forward_hook(lambda *args: calls.append("user"))
    observers, measurements = watch(model)
    observers.remove()
    model(torch.randn(1, 4))
    assert not measurements.tensors
    assert set(vars(model[0])) == before
    assert calls == ["user"], "the user's hooks stay"
    handle.remove()
    assert not any(getattr(model[0], hooks) for hooks in HOOKS)


def test_observing_changes_no_output_and_keeps_no_graph(watch):
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    expected = model(x)
    _, measurements = watch(model)
    assert torch.equal(model(x), expected)
    assert not measurements.range("0").requires_grad


# --- attention ----------------------------------------------------------------------------------------------------

X = torch.randn(2, 3, 5, 4)  # batch, heads, length, size


@pytest.fixture
def observers():
    return Observers(Measurements("f"))


def seen(observers, kind):
    """The range, and how many values it is of."""
    measurements = observers.measurements
    return measurements.range("attn", kind), measurements.tensors["attn", kind].statistics()["count"]


@pytest.mark.core
def test_per_head_and_over_all(observers):
    observers.observe_per_head("attn", "q", X)
    assert torch.equal(observers.measurements.range_per_head("attn", "q"), X.abs().amax((0, 2, 3)))
    assert seen(observers, "q") == (X.abs().max(), X.numel())
    observers.observe_per_head("attn", "q", 2 * X)
    assert torch.equal(observers.measurements.range_per_head("attn", "q"), 2 * X.abs().amax((0, 2, 3)))


def test_tensors_without_heads_are_seen_whole(observers):
    observers.observe_per_head("attn", "q", X[0])
    assert seen(observers, "q") == (X[0].abs().max(), X[0].numel())
    assert observers.measurements.range_per_head("attn", "q") is None


@pytest.mark.core
def test_padding_is_left_out_of_heads(observers):
    x, mask = X.clone(), torch.ones(2, 5)
    mask[0, :2] = 0
    x[0, :, :2] = 100.0
    with observers.only_where(mask):
        observers.observe_per_head("attn", "q", x)
    maxabs, count = seen(observers, "q")
    assert count == X.numel() - 2 * 3 * 4 and maxabs < 100


def test_keys_that_go_beyond_the_prompt_keep_its_padding_out(observers):
    x, mask = torch.cat([X, X], dim=2), torch.ones(2, 5)
    mask[0, :2] = 0
    x[0, :, :2] = 100.0
    with observers.only_where(mask):
        observers.observe_per_head("attn", "k", x)
        observers.observe_per_head("attn", "q", X[:, :, :1])  # the token that is decoded is never padding
    maxabs, count = seen(observers, "k")
    assert count == x.numel() - 2 * 3 * 4 and maxabs < 100
    assert seen(observers, "q")[1] == 2 * 3 * 4


def test_a_deep_copy_of_a_model_measures_for_itself():
    model = nn.Sequential(nn.Linear(4, 3))
    model.observers = Observers(Measurements("f"), ["input"])
    model.observers.attach("0", model[0])
    model(torch.ones(1, 4))
    clone = copy.deepcopy(model)
    clone(torch.ones(1, 4) * 9)
    assert (model.observers.measurements.range("0"), clone.observers.measurements.range("0")) == (1.0, 9.0)


# --- in the flow --------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_nan_in_the_data_is_an_error_that_names_the_module():
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), FP8Config())
    model(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]))
    with pytest.raises(FP8MeasurementError, match="^0: the measured input holds NaN or Inf"):
        convert(model)
    assert isinstance(model[0], nn.Linear)
