"""A tensor that several modules are given is observed once, and only as long as it is the same."""

import copy
import gc

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, prepare
from optimum_fp8.lifecycle import state_of
from optimum_fp8.measure import OBSERVERS, Measurements, Observers, observer_class
from optimum_fp8.measure.observers.maxabs import MaxAbs


class Counting(MaxAbs):
    """As maxabs; counts how often it looks at a tensor."""

    name, updates = "counting", 0

    def update(self, x):
        type(self).updates += 1
        super().update(x)


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(OBSERVERS, "counting", Counting)
    monkeypatch.setattr(Counting, "updates", 0)
    return Counting


def observers(names="ab", observer="counting"):
    found = Observers(Measurements("f", observer=observer), ("input",))
    modules = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    for name, module in modules.items():
        found.attach(name, module)
    return found, modules


@pytest.mark.core
def test_modules_that_share_an_input_observe_it_once(counting):
    found, modules = observers("abc")
    for x in (torch.full((2, 4), 3.0), torch.full((3, 4), 2.0)):
        for module in modules.values():
            module(x)
    assert counting.updates == 2
    for name in "abc":
        assert (
            found.measurements.range(name) == 3 and found.measurements.tensors[name, "input"]._statistics["count"] == 20
        )


def test_a_change_in_place_is_seen(counting):
    found, modules = observers()
    x = torch.ones(2, 4)
    modules["a"](x)
    x.mul_(5)
    modules["b"](x)
    x.view(8)[3] = 7.0
    modules["b"](x)
    assert (found.measurements.range("a"), found.measurements.range("b"), counting.updates) == (1, 7, 3)


def test_another_tensor_in_the_same_place_is_another(counting):
    found, modules = observers()
    for size in (1.0, 2.0, 3.0):
        x = torch.full((2, 4), size)
        modules["a"](x)
        del x
        gc.collect()
    assert found.measurements.range("a") == 3 and counting.updates == 3
    assert len(found._seen._known) == 0, "nothing is kept alive"


def test_other_masks_leave_other_tokens(counting):
    found, modules = observers()
    x = torch.ones(2, 3, 4)
    x[0, 0], x[1, 2] = 9.0, 5.0
    for name, mask in (("a", [[0, 1, 1], [1, 1, 1]]), ("b", [[0, 1, 1], [1, 1, 0]])):
        with found.only_where(torch.tensor(mask)):
            modules[name](x)
    assert (found.measurements.range("a"), found.measurements.range("b")) == (5, 1)
    modules["b"](x)
    assert found.measurements.range("b") == 9


def test_a_mask_that_is_noted_between_two_modules(counting):
    found, modules = observers()
    x = torch.ones(1, 3, 4)
    x[0, 0] = 9.0
    with found.only_where():
        modules["a"](x)
        found._padding.note(torch.tensor([[0, 1, 1]]))
        modules["b"](x)
    assert (found.measurements.range("a"), found.measurements.range("b")) == (9, 1)


def test_heads_and_the_whole_are_looked_at_apart(counting):
    found, _ = observers()
    x = torch.randn(2, 3, 5, 4)
    found.observe("a", "input", x)
    found.observe_per_head("b", "q", x)
    found.observe_per_head("b", "k", x)
    assert found.measurements.range_per_head("a", "input") is None
    assert torch.equal(found.measurements.range_per_head("b", "k"), x.abs().amax((0, 2, 3)))


def test_inference_tensors_have_no_version_and_are_observed_each_time(counting):
    found, modules = observers()
    with torch.inference_mode():
        x = torch.ones(2, 4)
        modules["a"](x)
        x.mul_(4)
        modules["b"](x)
    assert (found.measurements.range("a"), found.measurements.range("b")) == (1, 4)


def test_a_copy_of_a_model_observes_for_itself(counting):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = prepare(Pair(), FP8Config(observer="counting", measure_exclude="PARAMS"))
    x = torch.ones(1, 4)
    model(x)
    clone = copy.deepcopy(model)
    clone(x * 3)
    measurements = [state_of(each).measurements for each in (model, clone)]
    assert [[each.range("a"), each.range("b")] for each in measurements] == [[1, 1], [3, 3]]
    assert counting.updates == 2 * 3, "an input and two outputs, each time"


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_what_is_shared_is_what_each_would_have_seen(name, tmp_path):
    found, modules = observers("abc", "maxabs" if name == "save" else name)
    alone = {key: observer_class("maxabs" if name == "save" else name)() for key in "abc"}
    shared = [torch.randn(3, 4) for _ in range(3)]
    for x in shared:
        for key in "abc":
            own = torch.randn(2, 4)
            for each in (x, own) if key != "b" else (own, x):
                modules[key](each)
                alone[key].update(each)
    for key in "abc":
        statistics = found.measurements.tensors[key, "input"].statistics()
        expected = alone[key].statistics()
        assert statistics.keys() == expected.keys()
        assert all(torch.equal(value, expected[each]) for each, value in statistics.items())
