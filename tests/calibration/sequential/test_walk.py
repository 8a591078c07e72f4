"""Data go through a model part by part: each part runs as in the whole model, once, and what is kept is read later."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_fp8.calibration.sequential.kept import InMemory, OnDisk
from optimum_fp8.calibration.sequential.walk import Route, Walk, joined, scouted
from optimum_fp8.errors import FP8CalibrationError


class Block(nn.Module):
    """Returns a tuple of what it makes of `x`, of `side` as it was given, and of a constant."""

    def __init__(self, factor):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0
        nn.init.constant_(self.linear.weight, factor)

    def forward(self, x, side=None, cache=None):
        self.calls += 1
        if cache is not None:
            x = x + sum(cache)
            cache.append(x.mean())
        return self.linear(x), side, 1


class Chain(nn.Module):
    """Blocks one after the other; the last also reads what the block `skip` returned, scaled in place."""

    def __init__(self, count=4, skip=None, cached=False, again=False, noisy=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(0.1 * (n + 1)) for n in range(count))
        self.skip, self.cached, self.again, self.noisy = skip, cached, again, noisy

    def forward(self, x):
        side, cache, kept = x.sum(), [] if self.cached else None, 0
        for number, block in enumerate([*self.blocks, *self.blocks[:1]] if self.again else self.blocks):
            if number == len(self.blocks) - 1:
                x = x + kept
            if self.noisy:
                x = x + torch.rand_like(x)
            x, side, one = block(x, side=side, cache=cache)
            assert one == 1 and not side.isnan()
            if number == self.skip:
                kept = x
            x = x * 2
            x.mul_(0.5)
        return x

    def names(self):
        return [f"blocks.{number}" for number in range(len(self.blocks))]


X = torch.linspace(-1, 1, 12).view(3, 4)


def scout(model):
    with torch.no_grad():
        return scouted(model, model.names(), lambda: model(X))


def test_route_of_a_chain():
    model = Chain()
    names = model.names()
    readers = {a: frozenset({b}) for a, b in zip(names, names[1:], strict=False)} | {names[-1]: frozenset()}
    assert scout(model) == Route(tuple(names), readers)


def test_route_with_a_connection_over_others():
    route = scout(Chain(skip=0))
    assert route.readers["blocks.0"] == {"blocks.1", "blocks.3"} and route.readers["blocks.1"] == {"blocks.2"}


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("skip", [None, 0, 1])
def test_each_part_runs_once_more_and_gives_what_the_whole_gives(tmp_path, place, skip):
    model = Chain(skip=skip)
    route, inputs = scout(model), [X, X * 2]
    kept = InMemory() if place == "memory" else OnDisk(str(tmp_path))
    walk = Walk(model, model.names(), route, lambda batch: model(inputs[batch]), kept)
    for block in model.blocks:
        block.calls = 0
    with torch.no_grad():
        for name in model.names():
            found = [walk.to(batch, name)[0] for batch in range(2)]
            for x, output in zip(inputs, found, strict=True):
                expected = []
                hook = model.get_submodule(name).register_forward_hook(
                    lambda *call, to=expected: to.append(call[-1][0])
                )
                counts = [block.calls for block in model.blocks]
                model(x)
                for block, count in zip(model.blocks, counts, strict=True):
                    block.calls = count
                hook.remove()
                assert torch.equal(output, expected[0])
    # Twice each: when it is the goal, and for what it gives to the next; nothing follows the last.
    assert [block.calls for block in model.blocks] == [4, 4, 4, 2]
    if place == "disk":  # what the last part reads, for two batches
        assert len(list(tmp_path.iterdir())) == 2 * (1 if skip is None else 2)


def test_parts_that_were_replaced_are_those_that_run():
    model = Chain(count=2)
    walk = Walk(model, model.names(), scout(model), lambda batch: model(X), InMemory())
    with torch.no_grad():
        walk.to(0, "blocks.0")
        model.blocks[0] = Block(5.0)
        found = walk.to(0, "blocks.1")[0]
        expected = model(X)
    assert torch.equal(found, expected)


def test_forwards_are_put_back():
    model = Chain()
    own = model.blocks[1].forward = model.blocks[1].forward
    scout(model)
    assert model.blocks[1].__dict__["forward"] is own and "forward" not in model.blocks[0].__dict__


@pytest.mark.parametrize(
    "options, why",
    [
        ({"again": True}, "called several times"),
        ({"cached": True}, "reads more than what other parts return"),
        ({"noisy": True}, "random"),
    ],
)
def test_what_cannot_go_part_by_part_is_refused(options, why):
    with pytest.raises(FP8CalibrationError, match=f"{why}.*calibration='whole'"):
        scout(Chain(**options))


def test_another_order_is_refused():
    model = Chain(count=2)
    route = Route(("blocks.1", "blocks.0"), {"blocks.1": frozenset({"blocks.0"}), "blocks.0": frozenset()})
    walk = Walk(model, model.names(), route, lambda batch: model(X), InMemory())
    with pytest.raises(FP8CalibrationError, match=r"calls blocks\.0 before blocks\.1"):
        walk.to(0, "blocks.1")


def test_routes_of_several_kinds_of_batches_are_joined():
    one = Route(("v", "t", "u"), {"v": frozenset({"t"}), "t": frozenset({"u"}), "u": frozenset()})
    two = Route(("a", "t", "u"), {"a": frozenset({"u"}), "t": frozenset({"u"}), "u": frozenset()})
    route = joined([one, two])
    assert set(route.order[:2]) == {"v", "a"} and route.order[2:] == ("t", "u")
    assert route.readers["v"] == {"t"} and route.readers["a"] == {"u"}
    with pytest.raises(FP8CalibrationError, match="different orders"):
        joined([one, Route(("u", "t"), {"u": frozenset(), "t": frozenset()})])
