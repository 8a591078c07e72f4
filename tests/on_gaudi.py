"""What the tests on emulated cards share: the cards, a call on the reference and on one of them, how near they are."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.formats import is_fp8, number_format
from optimum_fp8.ops import dispatch
from optimum_fp8.ops.declare import call as call_operator
from optimum_fp8.ops.dispatch import Kernel
from optimum_fp8.test_utils import gaudi

FORMATS = ("E4M3", "E5M2")


@pytest.fixture(params=["gaudi2", "gaudi3"])
def device(request):
    with gaudi.emulated(request.param) as emulated:
        yield emulated


@pytest.fixture
def gaudi2():
    with gaudi.emulated("gaudi2") as emulated:
        yield emulated


@pytest.fixture
def gaudi3():
    with gaudi.emulated("gaudi3") as emulated:
        yield emulated


def fmt_of(device, fp8_config="E4M3"):
    """The number format of an emulated card."""
    return number_format(fp8_config, device.chip.name.lower())


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """While inside, the kernels of CPU tensors are chosen as a card's are: Gaudi's, and the reference where those
    refuse. An emulated card has to be there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "serves", lambda kernel, device: kernel.devices is None or "hpu" in kernel.devices)
        yield


def both(call):
    """What a call gives on Gaudi's kernels, and on the reference."""
    with ops.backend("hpu"):
        found = call()
    with ops.backend("reference"):
        return found, call()


def assert_near(found, expected, terms=1, before=None):
    """One unit in the last place apart at most, but for the order of a float32 sum of so many terms.

    Args:
        before: a value that was rounded on the way, which may be a unit apart as well.
    """
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not expected.numel():
        return
    assert torch.equal(found.isnan(), expected.isnan())
    found, wide = found.double().nan_to_num(), expected.double().nan_to_num()
    units = wide.abs() if before is None else wide.abs() + before.double().abs()
    bound = units * torch.finfo(expected.dtype).eps + terms * 2.0**-24 * float(units.max())
    assert float(((found - wide).abs() - bound).max()) <= 0


def same_codes(found, expected):
    """Whether codes stand for the same values; a NaN has several."""
    return torch.equal(found.float().nan_to_num(nan=1e9), expected.float().nan_to_num(nan=1e9))


def constant(scale):
    """A scale that is known when a model starts."""
    assert ops.mark_constant(scale, number_format("E4M3", "gaudi2").hardware_scales)
    return scale


def same_bytes(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """Whether two tensors are equal to the bit, whatever their strides; or both None."""
    if found is None or expected is None:
        return found is expected
    bits = [x.contiguous().view(torch.uint8) for x in (found, expected)]
    return found.dtype == expected.dtype and torch.equal(*bits)


def before_bias(output: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """About what a product was rounded to before its bias was added."""
    return output if bias is None else output.float() - bias.float().reshape(-1, *[1] * (weight.ndim - 2))


class NothingIsRead(TorchFunctionMode):
    """Refuses that the package reads a tensor's value, or makes a tensor whose shape depends on values: both wait for
    the device. The emulator may, and models may."""

    sees_operators = False  # calls of kernels are not to be hidden behind torch's dispatcher
    READS = {
        *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__contains__),
        *(torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__),
        *(torch.Tensor.equal, torch.Tensor.allclose, torch.equal, torch.allclose),
        *(torch.Tensor.nonzero, torch.Tensor.argwhere, torch.Tensor.masked_select, torch.Tensor.unique),
        *(torch.nonzero, torch.argwhere, torch.masked_select, torch.unique),
    }

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and (
            frame.f_code.co_name == "__torch_function__" or frame.f_globals["__name__"].startswith("torch.")
        ):
            frame = frame.f_back  # another mode, which only passes calls on, or torch's own code
        caller = frame.f_globals["__name__"]
        if self._reads(func, args) and caller.startswith("optimum_fp8.") and ".test_utils." not in caller:
            raise AssertionError(f"{caller} reads a value: {func}")
        return func(*args, **(kwargs or {}))

    def _reads(self, func: Any, args: tuple[Any, ...]) -> bool:
        if func is torch.Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(place, torch.Tensor) and place.dtype == torch.bool for place in places)
        return func in self.READS or (func in (torch.where, torch.Tensor.where) and len(args) == 1)


class Comparison:
    """What the operators of a model gave on Gaudi's kernels, beside the ordinary path of a CPU, on the same operands.

    Attributes:
        ran: calls that both computed, by operator.
        refused: calls that Gaudi's kernels leave to the reference, by operator and reason.
        probabilities: of fused attention, how many there were.
        flipped: rows of its output that are more than one step of bfloat16 apart: the exponentials of two machines
            differ in their last bit, and a probability on the edge between two codes may fall either way.
    """

    TERMS = 16  # float32's last bits that sums in another order may differ by, at the size of the largest output

    def __init__(self, device: Any):
        self.device, self.probabilities, self.flipped = device, 0, 0
        self.ran: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()

    def run(self, op: str, call: Any) -> Any:
        """The result of the ordinary path, after it was compared."""
        expected = Context().run(call_operator, op, call)  # where no backend is forced
        self._mark_constants(call)
        try:
            with ops.backend("hpu"):
                found = call_operator(op, call)
        except FP8NotAvailableError as error:
            self.refused[op, str(error)] += 1
            return expected
        self.ran[op] += 1
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        for one, other in pairs:
            if is_fp8(other.dtype) or op in ("maxabs", "histogram", "dynamic_scale", "cast_to_fp8_by_range"):
                assert same_bytes(one, other), f"{op}: codes, scales or ranges differ"
            elif op == "attention":
                self._compare_attention(call, one, other)
            else:
                bias = getattr(call, "bias", None)
                assert_near(one, other, self.TERMS, None if bias is None else before_bias(other, call.weight, bias))
        return expected

    def few_flips(self) -> bool:
        return self.flipped <= 1 + 1e-5 * self.probabilities

    def _mark_constants(self, call: Any) -> None:
        """As converted modules do on a card, so that scales which cost nothing there are given as numbers."""
        hardware = number_format("E4M3", self.device.chip.name.lower()).hardware_scales
        for name, value in call._asdict().items():
            if name.endswith("scale") and isinstance(value, torch.Tensor) and value.numel() == 1:
                ops.mark_constant(value, hardware)

    def _compare_attention(self, call: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert float((found.float() - expected.float()).abs().max()) <= 0.07 * float(expected.float().abs().max())
        units = expected.float().abs() * torch.finfo(torch.bfloat16).eps
        self.flipped += int(((found.float() - expected.float()).abs() > units + 1e-6).any(-1).sum())
        self.probabilities += call.query.shape[:3].numel() * call.key.shape[2]


@contextmanager
def compared(chip: str, bridge: str = "1.24") -> Iterator[Comparison]:
    """While inside, every operator runs on both paths, and its results are compared."""
    with gaudi.emulated(chip, bridge=bridge) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_kernels", {op: list(kernels) for op, kernels in dispatch._kernels.items()})
        comparison = Comparison(device)
        for op in dispatch._kernels:
            dispatch.register_kernel(op, Kernel("compared", (), partial(comparison.run, op)))
        with ops.backend("compared"):
            yield comparison
