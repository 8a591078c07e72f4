"""Attention of models written for Gaudi, by the arguments that callers give to its kernel: what the kernel computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.test_utils import gaudi

LENGTHS = torch.tensor([9, 16])
# attn_mask, dropout_p, is_causal, scale, softmax_mode, recompute_mode, valid_seq_len, seq_padding_type, two outputs,
# window_size, sinks: as many as a caller gives.
CALLS = {
    "plain": (None, 0.0, False, None),
    "causal": (None, 0.0, True, None),
    "padded on the left": (None, 0.0, True, 0.2, "None", True, LENGTHS, "left"),
    "padded on the right": (None, 0.0, True, None, "fast", True, LENGTHS, "right"),
    "window": (None, 0.0, True, None, "None", True, None, "left", False, False, (3, 0)),
    "window on both sides": (None, 0.0, False, None, "None", True, None, "left", False, False, (2, 4)),
    "sinks": (None, 0.0, True, None, "None", True, None, "left", False, False, None, torch.linspace(-1, 3, 4)),
}


class ModuleFusedSDPA(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self._hpu_kernel_fsdpa = kernel

    def forward(self, *args):
        return self._hpu_kernel_fsdpa.apply(*args)


def inputs(length=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 32, generator=generator).bfloat16() for _ in range(3)]


def converted(kernel, call):
    model = prepare(nn.Sequential(ModuleFusedSDPA(kernel)), FP8Config(attention=True, target="gaudi3"))
    model[0](*inputs(), *call)
    return convert(model)[0]


@pytest.mark.parametrize("call", CALLS)
def test_it_computes_what_the_kernel_does(call):
    with gaudi.emulated("gaudi3"), torch.no_grad():
        from habana_frameworks.torch.hpex.kernels import FusedSDPA

        call = CALLS[call]
        expected, found = FusedSDPA.apply(*inputs(), *call), converted(FusedSDPA, call)(*inputs(), *call)
    kept = expected.isfinite() & (expected != 0)  # rows that see nothing are zeros in the kernel
    assert kept.float().mean() > 0.75
    torch.testing.assert_close(found[kept], expected[kept], atol=0.15, rtol=0.1)


def test_the_arguments_matter():
    """Or the test above would show nothing."""
    with gaudi.emulated("gaudi3"), torch.no_grad():
        from habana_frameworks.torch.hpex.kernels import FusedSDPA

        found = [FusedSDPA.apply(*inputs(), *call) for call in CALLS.values()]
    for at, one in enumerate(found):
        assert all((one - other).abs().max() > 0.5 for other in found[at + 1 :])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((torch.zeros(16, 16), 0.0, True), "is_causal beside an attn_mask"),
        ((None, 0.0, False, None, "None", True, LENGTHS), "valid_seq_len without is_causal"),
        ((None, 0.0, True, None, "None", True, None, "left", True), "return_dropout_mask"),
    ],
)
def test_what_no_mask_says_is_refused(call, named):
    def kernel(*args):
        return args[2]

    module = converted(type("Kernel", (), {"apply": staticmethod(kernel)}), ())
    with pytest.raises(FP8NotAvailableError, match=named):
        module(*inputs(), *call)
