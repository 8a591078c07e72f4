"""Layers that processes compute together on an emulated Gaudi: what each is asked to compute, and in which order."""

from __future__ import annotations

import pytest
from ranks import succeed

ON_GAUDI = """
import torch
import torch.distributed as dist
import vllm_layers as vllm
from optimum_fp8 import FP8Config, convert, ops, prepare
from optimum_fp8.test_utils import gaudi

chip = {chip!r}
dist.init_process_group("gloo")
torch.set_grad_enabled(False)
torch.manual_seed(0)
x = torch.randn(2, 3, 16).bfloat16()
key = {{"row_parallel_linear_allreduce_quantization": True}}

def converted():
    model = prepare(vllm.MLP(dtype=torch.bfloat16), FP8Config(target=chip, **key))
    model(x)
    return convert(model)

def distance(x, y):
    return float((x.float() - y.float()).norm() / y.float().norm())

model = converted()
prefill, token = model(x)[0], model(x[:, :1])[0]
order = []
reduce = vllm.tensor_model_parallel_all_reduce

def watched(y):
    order.append(("sum", y.dtype, len(device.calls)))
    return reduce(y)

with gaudi.emulated(chip) as device, ops.backend("hpu"):
    packed = converted()
    vllm.tensor_model_parallel_all_reduce = watched
    device.calls.clear()
    found = packed(x)[0]
    calls = list(device.calls)
    device.calls.clear()
    new = packed(x[:, :1])[0]
    decoding = list(device.calls)

# The product of the last layer has no bias, and is added up in bfloat16 after it was taken.
gemms = [call for call in calls if call.name == "fp8_gemm_v2"]
assert len(gemms) == 2 and all(call.arguments["bias"] is None for call in gemms)
assert all(call.arguments["out_dtype"] == torch.bfloat16 and call.free_scales for call in gemms)
assert order == [("sum", torch.bfloat16, len(calls))] and calls[-1].name == "fp8_gemm_v2"

# Of a new token: product, codes of the result; codes of all to values, their sum to codes, codes to the output.
after = decoding[[call.name for call in decoding].index("fp8_gemm_v2") + 1 :]
names = [call.name for call in after]
last = names.index("fp8_gemm_v2")
assert names[last + 1 :] == ["cast_to_fp8_v2", "cast_from_fp8", "cast_to_fp8_v2", "cast_from_fp8"], names
assert all(call.overload == "scalar" and call.free_scales for call in after[last + 1 :]), "constants, at no cost"
partial, total = packed.down.partial_scale.item(), packed.down.output_scale.item()
values = [next(iter(call.scales.values()))[0].values[0] for call in after[last + 1 :]]
assert values == [1 / partial, partial, 1 / total, total], "1/s to quantize, s to dequantize"
assert len(order) == 1, "no sum in high precision"

# What the reference computes, up to one unit in the last place of bfloat16 where sums end elsewhere.
for mine, theirs in ((found, prefill), (new, token)):
    assert mine.dtype == torch.bfloat16 and distance(mine, theirs) < 2.0 ** -8
    everywhere = [torch.empty_like(mine) for _ in range(count)]
    dist.all_gather(everywhere, mine)
    assert all(torch.equal(other, mine) for other in everywhere)
assert torch.equal(packed.down.codes.float(), model.down.codes.float())
assert all("scale" in name for name, tensor in packed.state_dict().items() if tensor.dtype == torch.float32)
"""


@pytest.mark.parametrize("chip", ["gaudi2", pytest.param("gaudi3", marks=pytest.mark.slow)])
def test_two_processes_on_an_emulated_gaudi(chip, tmp_path):
    succeed(ON_GAUDI.format(chip=chip), 2, tmp_path)


EVERY_METHOD = """
import torch
import torch.distributed as dist
import vllm_layers as vllm
from optimum_fp8 import FP8Config, convert, ops, prepare
from optimum_fp8.scales import SCALE_METHODS
from optimum_fp8.test_utils import gaudi

dist.init_process_group("gloo")
torch.set_grad_enabled(False)
torch.manual_seed(0)
x = torch.randn(2, 3, 16).bfloat16()
new = torch.randn(4, 1, 16).bfloat16()

def converted(method, target):
    keys = {"scale_method": method, "target": target, "row_parallel_linear_allreduce_quantization": True}
    model = prepare(vllm.MLP(dtype=torch.bfloat16, bias=False), FP8Config(**keys))
    model(x)
    return convert(model)

# Searching for the scale of a weight takes long, and sums do not depend on it.
STATIC = [name for name, each in SCALE_METHODS.items() if not each.dynamic_only and each.weight.value != "search"]
for target in ("gaudi2", "gaudi3"):
    for method in STATIC:
        plain = converted(method, target)
        expected = plain(x)[0], plain(new)[0]
        with gaudi.emulated(target) as device, ops.backend("hpu"):
            packed = converted(method, target)
            found = packed(x)[0], packed(new)[0]
        for name in ("codes", "weight_scale", "input_scale", "partial_scale", "output_scale"):
            assert torch.equal(getattr(packed.down, name).float(), getattr(plain.down, name).float()), (method, name)
        # A sum is rounded to bfloat16 by each process, and that of a new token to FP8.
        for one, other, step in zip(found, expected, (2**-7, 2**-3)):
            assert ((one - other).abs() <= step * other.abs().clamp(min=other.abs().max() / 64)).all(), method
            assert (one == other).float().mean() > 0.97, method
"""


@pytest.mark.slow
def test_every_scale_method_in_two_processes(tmp_path):
    succeed(EVERY_METHOD, 2, tmp_path)
